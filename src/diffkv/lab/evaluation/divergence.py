"""How far next-token distributions are from those of full precision, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Divergence", "compare", "first_difference"]


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


def compare(full: np.ndarray, other: np.ndarray, tokens: Sequence[Sequence[int]]) -> Divergence:
    """Compare distributions of the same texts.

    Args:
        full: [texts, steps, vocabulary] float32 log-probabilities; may be mapped from a file.
        other: likewise.
        tokens: [texts, steps] the token that each distribution is about.
    """
    rows = [_compare(*row) for row in zip(full, other, tokens, strict=True)]
    return Divergence(*(np.stack(column) for column in zip(*rows, strict=True)))


def _compare(full: np.ndarray, other: np.ndarray, tokens: Sequence[int]) -> tuple[np.ndarray, ...]:
    kld = np.einsum("sv,sv->s", np.exp(full), full - other).clip(min=0)
    steps = np.arange(len(full))
    same = full.argmax(-1) == other.argmax(-1)
    return kld, same, -full[steps, tokens], -other[steps, tokens]


def first_difference(same: np.ndarray) -> np.ndarray:
    """[texts]: the first step whose tokens differ; all steps where none do.

    Args:
        same: [texts, steps] bool.
    """
    return np.where(same.all(1), same.shape[1], same.argmin(1))
