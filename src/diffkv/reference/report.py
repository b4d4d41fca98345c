"""What a pool holds, and some of its rows."""

import torch
from torch import Tensor

from diffkv.state import PoolState

__all__ = ["report"]


def report(state: PoolState, slots: Tensor, numbers: Tensor) -> None:
    """Count what a pool holds, and what some of its rows do and may come to hold.

    Args:
        state: only read.
        slots: [R] int32, rows; -1 for one that is none, and holds nothing.
        numbers: [1 + R, 3 + K] int64, written. Of the pool: overruns, free pages, demotions so far, and
            zeros. Of each row, over all layers and heads: pages, high tokens, low tokens, and the most
            pages that 1, 2, … K more tokens can add. Each token goes to one tier of each head, and a
            tier takes a page when its last one is full. The latter means nothing where tokens are as
            the model made them (`PoolState.exact`).
    """
    head, tail = state.ring_ends.tolist()
    numbers.zero_()
    numbers[0, :3] = torch.tensor([int(state.overruns), tail - head, int(state.demotions)])
    for row, slot in zip(numbers[1:], slots.tolist(), strict=True):
        if slot >= 0:
            row[0] = state.num_pages_held[slot].sum()
            row[1:3] = state.num_tokens[slot].sum((0, 1))
            for more in range(1, len(row) - 2):
                row[2 + more] = _growth(state, slot, more)


def _growth(state: PoolState, slot: int, more: int) -> int:
    """Most pages that so many tokens can add to a row: for each head the worst split between tiers."""
    high = [_added(state, slot, 0, count) for count in range(more + 1)]
    if state.layout.low is None:
        return int(high[more].sum())
    low = [_added(state, slot, 1, count) for count in range(more + 1)]
    splits = [high[count] + low[more - count] for count in range(more + 1)]
    return int(torch.stack(splits).amax(0).sum())


def _added(state: PoolState, slot: int, tier: int, count: int) -> Tensor:
    """[L, H] int64: pages that so many tokens add to one tier of each head."""
    per_page = state.layout.tiers[tier].tokens_per_page
    held, tokens = (x[slot, ..., tier].long() for x in (state.num_pages_held, state.num_tokens))
    room = held * per_page - tokens
    return -(-(count - room).clamp(min=0) // per_page)
