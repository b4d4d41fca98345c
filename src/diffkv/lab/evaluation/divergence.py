"""How far next-token distributions are from those of full precision, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Divergence", "compare", "first_difference", "mapped"]


@dataclass(frozen=True)
class Divergence:
    """Numbers of every step of every text.

    Attributes:
        kld: [texts, steps] KL(full || other), in nats.
        same: [texts, steps] bool, whether the most likely tokens are equal.
        nll_full: [texts, steps] minus log-probability of the token that follows, full precision.
        nll: likewise, the other cache's.
    """

    kld: np.ndarray
    same: np.ndarray
    nll_full: np.ndarray
    nll: np.ndarray

    @classmethod
    def join(cls, parts: "Sequence[Divergence]", axis: int) -> "Divergence":
        """One of several that follow each other: more texts (axis 0), or more steps (axis 1)."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(column, axis) for column in columns))


def compare(full: Tensor, other: Tensor, tokens: Tensor) -> Divergence:
    """Compare distributions of the same texts.

    Args:
        full: [texts, steps, vocabulary] float32 log-probabilities.
        other: likewise, on the same device.
        tokens: [texts, steps] int64, the token that each distribution is about.
    """
    kld = (full.exp() * (full - other)).sum(-1).clamp(min=0)
    same = full.argmax(-1) == other.argmax(-1)
    about = tokens.to(full.device)[..., None]
    found = kld, same, -full.gather(-1, about)[..., 0], -other.gather(-1, about)[..., 0]
    return Divergence(*(values.cpu().numpy() for values in found))


def first_difference(same: np.ndarray) -> np.ndarray:
    """[texts]: the first step whose tokens differ; all steps where none do.

    Args:
        same: [texts, steps] bool.
    """
    return np.where(same.all(1), same.shape[1], same.argmin(1))


def mapped(file: Path) -> Tensor:
    """Log-probabilities in a numpy file, each read when it is used."""
    return torch.from_numpy(np.load(file, mmap_mode="c"))
