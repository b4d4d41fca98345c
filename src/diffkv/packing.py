"""Tokens of several rows, one row after the other, and where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from diffkv.state import PromptTokens

__all__ = ["Packing", "RowPlaces", "joined", "on_device", "spans_of", "spread"]


@dataclass(frozen=True)
class RowPlaces:
    """Rows that are read back together, and where their tokens go.

    Attributes:
        span: the place of all of them in their request.
        slots: [C] int32.
        starts: [C] int32, where each one's tokens begin, counted from the start of `span`.
    """

    span: slice
    slots: Tensor
    starts: Tensor

    @classmethod
    def of(
        cls, slots: Sequence[int], bounds: Sequence[int], device: torch.device
    ) -> "RowPlaces | None":
        """Rows between neighbouring bounds; None if there are none."""
        if not slots:
            return None
        places = [bound - bounds[0] for bound in bounds[:-1]]
        return cls(
            slice(bounds[0], bounds[-1]),
            on_device(slots, torch.int32, device),
            on_device(places, torch.int32, device),
        )


@dataclass(frozen=True)
class Packing:
    """Tokens of R rows that are stored together, N in all, one row after the other.

    Attributes:
        slots: [R] int32.
        starts: [R + 1] int32, where each row's tokens start.
        positions: [N] int32, index of each token in its request.
    """

    slots: Tensor
    starts: Tensor
    positions: Tensor

    @classmethod
    def of(
        cls,
        slots: Sequence[int],
        firsts: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
    ) -> "Packing":
        """Pack the tokens from `firsts` on of some rows."""
        starts = [0, *accumulate(lengths)]
        offsets = [first - start for first, start in zip(firsts, starts, strict=False)]
        each = torch.arange(starts[-1], dtype=torch.int32, device=device)
        return cls(
            on_device(slots, torch.int32, device),
            on_device(starts, torch.int32, device),
            each + spread(offsets, torch.int32, lengths, device),
        )

    def tokens(self, key: Tensor, value: Tensor) -> PromptTokens:
        """The argument of `store_prompt`: key and value are [N, num_kv_heads, head_dim]."""
        return PromptTokens(self.slots, self.starts, key, value, self.positions)


def spread(
    values: Sequence[float], dtype: torch.dtype, lengths: Sequence[int], device: torch.device
) -> Tensor:
    """[sum(lengths)]: each value as often as its length says."""
    counts = on_device(lengths, torch.int64, device)
    each = on_device(values, dtype, device)
    return torch.repeat_interleave(each, counts, output_size=sum(lengths))


def spans_of(spans: Sequence[slice], device: torch.device) -> slice | Tensor:
    """The rows of some spans, one span after the other: a slice where they are neighbours."""
    if all(a.stop == b.start for a, b in pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    lengths = [span.stop - span.start for span in spans]
    starts = [0, *accumulate(lengths)]
    offsets = [span.start - start for span, start in zip(spans, starts, strict=False)]
    each = torch.arange(starts[-1], device=device)
    return each + spread(offsets, torch.int64, lengths, device)


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)], copied without waiting for the device."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other along the first dimension."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
