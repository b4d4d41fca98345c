"""Take pages from the free ring and give them back, for many heads at once."""

import torch
from torch import Tensor

from diffkv.state import PoolState

__all__ = ["give_back", "take"]


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
    tail = int(state.ring_ends[1])
    places = (tail + torch.arange(pages.numel(), device=pages.device)) % state.num_pages
    state.free_ring[places] = pages.to(torch.int32)
    state.ring_ends[1] = tail + pages.numel()
