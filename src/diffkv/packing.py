"""Tokens of several rows, one row after the other, and where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkv.state import PromptTokens
from diffkv.uploads import Place

__all__ = ["Packing", "RowPlaces", "joined", "ranges", "spans_of"]


@dataclass(frozen=True)
class RowPlaces:
    """Rows that are read back together, and where their tokens go.

    Attributes:
        span: the place of all of them among tokens that are seen.
        slots: [C] int32.
        starts: [C] int32, where each one's tokens begin, counted from the start of `span`. What is
            between the tokens of a row and those of the next is written too, with anything.
    """

    span: slice
    slots: Tensor
    starts: Tensor

    @classmethod
    def of(
        cls, slots: Sequence[int], begins: Sequence[int], end: int, place: Place
    ) -> "RowPlaces | None":
        """Rows that begin there, the last of which ends at `end`; None if there are none."""
        if not slots:
            return None
        starts = [begin - begins[0] for begin in begins]
        return cls(slice(begins[0], end), place(slots), place(starts))


@dataclass(frozen=True)
class Packing:
    """Tokens of R rows that are stored together, N in all, one row after the other.

    Attributes:
        slots: [R] int32.
        starts: [R + 1] int32, where each row's tokens start.
        positions: [N] int32, index of each token in its request.
        num_tokens: N.
    """

    slots: Tensor
    starts: Tensor
    positions: Tensor
    num_tokens: int

    @classmethod
    def of(
        cls, slots: Sequence[int], firsts: Sequence[int], lengths: Sequence[int], place: Place
    ) -> "Packing":
        """Pack the tokens from `firsts` on of some rows."""
        spans = [slice(a, a + n) for a, n in zip(firsts, lengths, strict=True)]
        starts = [0, *accumulate(lengths)]
        return cls(place(slots), place(starts), place(ranges(spans)), starts[-1])

    def tokens(self, key: Tensor, value: Tensor) -> PromptTokens:
        """The argument of `store_prompt`: key and value are [N, num_kv_heads, head_dim]."""
        return PromptTokens(self.slots, self.starts, key, value, self.positions)


def ranges(spans: Sequence[slice]) -> Any:
    """[.] int64 array: the numbers of some spans, one span after the other."""
    return np.concatenate([np.arange(span.start, span.stop) for span in spans])


def spans_of(spans: Sequence[slice], place: Place) -> slice | Tensor:
    """The rows of some spans, one span after the other: a slice where they are neighbours."""
    if all(a.stop == b.start for a, b in pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    return place(ranges(spans), torch.int64)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other along the first dimension."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
