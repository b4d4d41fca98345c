"""Create a pool inside a buffer, and look at it from outside.

What changes a pool is in the operations; here is only how it begins, what it holds, and what must always
be true of it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffkv import huge_pages
from diffkv.layout import PageLayout
from diffkv.reference.pages import page_ids
from diffkv.shape import TABLE_ALIGNMENT_BYTES, PoolShape
from diffkv.state import IDS, TENSORS, PoolState, TensorSpec, sizes_of
from diffkv.tier import align

__all__ = [
    "check_invariants",
    "contents",
    "create",
    "prompt_pages",
    "restore",
]


def create(shape: PoolShape, buffer: Tensor, dtype: torch.dtype, window: int) -> PoolState:
    """Make an empty pool inside a buffer: tables first, then pages.

    Args:
        shape: a split of at most the buffer's bytes, see `PoolShape.fit`.
        buffer: [num_bytes] uint8 or int8, contiguous, aligned to 64 bytes; what it holds is lost.
        dtype: the model's.
        window: recent tokens that always stay high.

    Raises:
        ValueError: the buffer is too small.
    """
    huge_pages.use(buffer)
    raw, tensors, end = buffer.view(torch.uint8), {}, 0
    for name, spec in TENSORS.items():
        start = align(end, TABLE_ALIGNMENT_BYTES)
        dims = sizes_of(spec.shape, shape)
        end = start + torch.Size(dims).numel() * spec.dtype.itemsize
        if end > raw.numel():
            raise ValueError(
                f"buffer of {raw.numel()} bytes is too small for {name} {list(dims)} {spec.dtype} at "
                f"{start}"
            )
        tensors[name] = raw[start:end].view(spec.dtype).view(dims)
        _begin(tensors[name], spec, shape)
    return PoolState(shape.layout, dtype, window, shape.segment, **tensors)


def _begin(tensor: Tensor, spec: TensorSpec, shape: PoolShape) -> None:
    """Write a tensor's initial value; where none matters, a host need not commit its memory yet."""
    if spec.initial == IDS:
        tensor.copy_(torch.arange(len(tensor), dtype=spec.dtype))
    elif isinstance(spec.initial, str):
        tensor.copy_(torch.tensor(sizes_of(spec.initial, shape)))
    elif spec.initial is not None:
        tensor.fill_(spec.initial)


def contents(state: PoolState) -> dict[str, Tensor]:
    """A copy of all that a pool holds: every table, and of its pages those that are not free.

    Returns:
        Tensors by their name in `PoolState`; `pages` only of the ids in `page_ids`.
    """
    head, tail = state.ring_ends.tolist()
    ring = torch.arange(head, tail, device=state.pages.device) % state.num_pages
    is_held = torch.ones(state.num_pages, dtype=torch.bool, device=state.pages.device)
    is_held[state.free_ring[ring].long()] = False
    held = is_held.nonzero().flatten()
    tables = {name: getattr(state, name).clone() for name in TENSORS if name != "pages"}
    return {**tables, "page_ids": held, "pages": state.pages[held]}


def restore(state: PoolState, copied: Mapping[str, Tensor]) -> None:
    """Make a pool hold what `contents` copied from another one of its shape."""
    for name in TENSORS:
        if name != "pages":
            getattr(state, name).copy_(copied[name])
    state.pages[copied["page_ids"].to(state.pages.device)] = copied["pages"].to(state.pages.device)


def prompt_pages(layout: PageLayout, tiers: Tensor) -> int:
    """Pages that a prompt takes in one layer: tiers [num_kv_heads, N] int8 of HIGH, LOW, DROPPED."""
    return sum(
        int((-(-(tiers == i).sum(1) // tier.tokens_per_page)).sum())
        for i, tier in enumerate(layout.tiers)
    )


def check_invariants(state: PoolState, waiting: Sequence[int] = ()) -> None:
    """Raise AssertionError, with its numbers, if a page is lost, owned twice, or held for nothing.

    The same of leaves.

    Args:
        state: the pool.
        waiting: slots of rows whose tokens are as the model made them (`PoolState.exact`).
    """
    _check_tables(state, waiting)
    leaves = state.directory.flatten().cpu().long()
    _check_ring("leaf", state.free_leaves, state.leaf_ends, leaves[leaves >= 0])
    pages = [
        page_ids(state, tuple(head), tier)
        for *head, tier in torch.nonzero(state.num_pages_held).tolist()
    ]
    held = torch.cat(pages).cpu() if pages else torch.zeros(0, dtype=torch.int64)
    _check_ring("page", state.free_ring, state.ring_ends, held)
    assert int(state.overruns) == 0, f"{int(state.overruns)} plans wanted more pages than were free"


def _check_ring(name: str, ring: Tensor, ends: Tensor, held: Tensor) -> None:
    """All things of a kind are free or held, and once."""
    head, tail = ends.tolist()
    num, num_free = len(ring), tail - head
    assert 0 <= num_free <= num, f"{num_free} of {num} {name} ids are free"
    owned = torch.cat([ring.cpu()[(head + torch.arange(num_free)) % num].long(), held])
    assert len(owned) == num, f"{num_free} free + {len(held)} held {name} ids are not {num}"
    assert torch.equal(owned.sort().values, torch.arange(num)), (
        f"some {name} is free or held twice, or not at all"
    )


def _check_tables(state: PoolState, waiting: Sequence[int]) -> None:
    """Each head holds the pages that its tokens need, and the leaves that name them."""
    held = state.num_pages_held.cpu()
    exact = state.layout.exact().high.tokens_per_page
    for tier, layout in enumerate(state.layout.tiers):
        per_page = torch.full((state.num_slots, 1, 1), layout.tokens_per_page)
        per_page[list(waiting)] = exact
        needed = -(-state.num_tokens[..., tier].cpu() // per_page)
        assert torch.equal(needed, held[..., tier]), (
            f"heads hold other numbers of {layout.format} pages than their tokens need"
        )
    columns = torch.arange(state.directory_width)
    high, low = (-(-held // state.leaf_entries)).unbind(-1)
    owned = (columns < high[..., None]) | (columns >= state.directory_width - low[..., None])
    assert torch.equal(owned, state.directory.cpu() >= 0), (
        "entries of the directory are not where the counts say"
    )
