"""Take pages and leaves from their free rings and give them back, for many heads at once."""

import torch
from torch import Tensor

from diffkv.state import PoolState

__all__ = ["give_back", "give_back_leaves", "take", "take_leaf"]


def take(state: PoolState, wanted: Tensor) -> Tensor | None:
    """Take pages for many heads: an exclusive prefix sum gives each its own slice of the ring.

    Args:
        state: `ring_ends` moves on; counts one in `overruns` and changes nothing else if fewer
            pages are free than wanted.
        wanted: int, pages each head wants; any shape, slices follow its row-major order.

    Returns:
        int64, ring index of each head's first page, in the shape of `wanted`; None after an overrun.
    """
    flat = wanted.flatten().to(torch.int64)
    head, tail = state.ring_ends.tolist()
    total = int(flat.sum())
    if total > tail - head:
        state.overruns.add_(1)
        return None
    state.ring_ends[0] = head + total
    return (head + flat.cumsum(0) - flat).view(wanted.shape)


def give_back(state: PoolState, pages: Tensor) -> None:
    """Append page ids [n] to the ring, in order."""
    _append(state.free_ring, state.ring_ends, pages)


def take_leaf(state: PoolState) -> int:
    """Take one leaf. There always is one: see `PoolState`."""
    head = int(state.leaf_ends[0])
    state.leaf_ends[0] = head + 1
    return int(state.free_leaves[head % len(state.free_leaves)])


def give_back_leaves(state: PoolState, leaves: Tensor) -> None:
    """Append ids of leaves [n] to their ring, in order."""
    _append(state.free_leaves, state.leaf_ends, leaves)


def _append(ring: Tensor, ends: Tensor, ids: Tensor) -> None:
    tail = int(ends[1])
    places = (tail + torch.arange(ids.numel(), device=ids.device)) % len(ring)
    ring[places] = ids.to(torch.int32)
    ends[1] = tail + ids.numel()
