"""Create a pool inside a buffer, and look at it from outside.

What changes a pool is in the operations; here is only how it begins, what it holds, and what must always
be true of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from diffkv import huge_pages
from diffkv.layout import PageLayout
from diffkv.reference.pages import page_ids
from diffkv.shape import TABLE_ALIGNMENT_BYTES, CacheShape, PoolShape
from diffkv.state import CacheState, PoolState

__all__ = [
    "check_invariants",
    "contents",
    "create",
    "create_cache",
    "held_pages",
    "page_growth",
    "prompt_pages",
    "restore",
]


class _Buffer:
    """Hands out aligned regions of a buffer, one after the other."""

    def __init__(self, buffer: Tensor) -> None:
        self._raw = buffer.view(torch.uint8)
        self._offset = 0

    def region(self, dims: tuple[int, ...], kind: torch.dtype, fill: float | None = 0) -> Tensor:
        """The next region, filled unless `fill` is None.

        Raises:
            ValueError: the buffer has no room for it.
        """
        num_bytes = torch.Size(dims).numel() * kind.itemsize
        end = self._offset + num_bytes
        if end > self._raw.numel():
            raise ValueError(
                f"buffer of {self._raw.numel()} bytes is too small for a region {list(dims)} {kind} "
                f"at {self._offset}"
            )
        tensor = self._raw[self._offset : end].view(kind).view(dims)
        if fill is not None:
            tensor.fill_(fill)
        self._offset = -(-end // TABLE_ALIGNMENT_BYTES) * TABLE_ALIGNMENT_BYTES
        return tensor


def create(shape: PoolShape, buffer: Tensor, dtype: torch.dtype, window: int) -> PoolState:
    """Make an empty pool of one group of layers inside a buffer; arguments as of `create_cache`."""
    return _create([shape], buffer, dtype, window)[0]


def create_cache(shape: CacheShape, buffer: Tensor, dtype: torch.dtype, window: int) -> CacheState:
    """Make an empty pool for all layers inside a buffer: tables first, then pages.

    Args:
        shape: as `CacheShape.fit` found it for a budget of at most the buffer's bytes.
        buffer: [num_bytes] uint8 or int8, contiguous, aligned to 64 bytes; what it holds is lost.
        dtype: the model's.
        window: recent tokens that always stay high.
    """
    states = _create(shape.groups, buffer, dtype, window)
    return CacheState(states, tuple(group.layers for group in shape.layout.groups))


def _create(
    shapes: Sequence[PoolShape], buffer: Tensor, dtype: torch.dtype, window: int
) -> tuple[PoolState, ...]:
    """Groups with the same slots, pages and ring, each with tables of its own."""
    huge_pages.use(buffer)
    one, memory = shapes[0], _Buffer(buffer)
    overruns = memory.region((1,), torch.int32)
    thresholds = memory.region((one.num_slots, 2), torch.float32)
    prompt_lens = memory.region((one.num_slots,), torch.int32)
    tables = []
    for shape in shapes:
        heads = (shape.num_slots, shape.num_layers, shape.num_kv_heads)
        directory = memory.region((*heads, shape.directory_width), torch.int32, -1)
        num_tokens = memory.region((*heads, 2), torch.int32)
        tables.append((directory, num_tokens, memory.region((*heads, 2), torch.int32)))
    half_empty = one.num_slots * sum(shape.half_empty_leaves for shape in shapes)
    num_leaves = -(-one.num_pages // one.leaf_entries) + half_empty
    leaves = memory.region((num_leaves, one.leaf_entries), torch.int32, -1)
    free_leaves, leaf_ends = _full_ring(memory, num_leaves)
    free_ring, ring_ends = _full_ring(memory, one.num_pages)
    # What a page holds before it is written does not matter; a host need not commit its memory yet.
    pages = memory.region((one.num_pages, one.layout.page_bytes), torch.uint8, None)
    return tuple(
        PoolState(
            shape.layout, dtype, window, pages, free_ring, ring_ends, leaves, free_leaves, leaf_ends,
            *own, thresholds, prompt_lens, overruns,
        )
        for shape, own in zip(shapes, tables, strict=True)
    )  # fmt: skip


def _full_ring(memory: _Buffer, num: int) -> tuple[Tensor, Tensor]:
    """A ring of all ids below `num`, and its ends."""
    ring = memory.region((num,), torch.int32, None)
    ring.copy_(torch.arange(num, dtype=torch.int32))
    ends = memory.region((2,), torch.int64)
    ends[1] = num
    return ring, ends


def held_pages(state: PoolState, slots: Tensor) -> Tensor:
    """Pages that each of some slots holds: [R] int64."""
    return state.num_pages_held[slots].sum((1, 2, 3))


def contents(state: PoolState) -> dict[str, Tensor]:
    """A copy of all that a pool holds: every table, and of its pages those that are not free.

    Returns:
        Tensors by their name in `PoolState`; `pages` only of the ids in `page_ids`.
    """
    copied = {name: tensor.clone() for name, tensor in _tables(state).items()}
    head, tail = state.ring_ends.tolist()
    ring = torch.arange(head, tail, device=state.pages.device) % state.num_pages
    is_held = torch.ones(state.num_pages, dtype=torch.bool, device=state.pages.device)
    is_held[state.free_ring[ring].long()] = False
    held = is_held.nonzero().flatten()
    return {**copied, "page_ids": held, "pages": state.pages[held]}


def restore(state: PoolState, copied: Mapping[str, Tensor]) -> None:
    """Make a pool hold what `contents` copied from another one of its shape."""
    for name, tensor in _tables(state).items():
        tensor.copy_(copied[name])
    state.pages[copied["page_ids"].to(state.pages.device)] = copied["pages"].to(state.pages.device)


def _tables(state: PoolState) -> dict[str, Tensor]:
    """The tensors of a pool, without its pages."""
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    return {name: x for name, x in values.items() if isinstance(x, Tensor) and name != "pages"}


def prompt_pages(layout: PageLayout, tiers: Tensor) -> int:
    """Pages that a prompt takes in one layer: tiers [num_kv_heads, N] int8 of HIGH, LOW, DROPPED."""
    return sum(
        int((-(-(tiers == i).sum(1) // tier.tokens_per_page)).sum())
        for i, tier in enumerate(layout.tiers)
    )


def page_growth(state: PoolState, slots: Tensor, most: int) -> Tensor:
    """Most pages that 1, 2, … `most` more tokens can add to each of some slots: [R, most] int64.

    Each token goes to one tier of each head; a tier takes a page when its last one is full.
    """
    slots = slots.long()
    added = []  # by tier, pages for 0, 1, … tokens: [most + 1, R, L, H]
    counts = torch.arange(most + 1, device=slots.device).view(-1, 1, 1, 1)
    for i, tier in enumerate(state.layout.tiers):
        held = state.num_pages_held[slots, :, :, i] * tier.tokens_per_page
        free = held - state.num_tokens[slots, :, :, i]
        added.append(-(-(counts - free).clamp(min=0) // tier.tokens_per_page))
    high = added[0]
    if len(added) == 1:
        return high[1:].sum((2, 3)).T
    low = added[1]
    worst = [
        torch.stack([high[k] + low[n - k] for k in range(n + 1)]).amax(0)
        for n in range(1, most + 1)
    ]
    return torch.stack(worst).sum((2, 3)).T


def check_invariants(*groups: PoolState) -> None:
    """Raise AssertionError, with its numbers, if a page is lost, owned twice, or held for nothing.

    The same of leaves.

    Args:
        *groups: all groups of layers of one pool.
    """
    state = groups[0]
    for group in groups:
        _check_tables(group)
    leaves = torch.cat([group.directory.flatten().cpu().long() for group in groups])
    _check_ring("leaf", state.free_leaves, state.leaf_ends, leaves[leaves >= 0])
    pages = [
        page_ids(group, tuple(head), tier)
        for group in groups
        for *head, tier in torch.nonzero(group.num_pages_held).tolist()
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


def _check_tables(state: PoolState) -> None:
    """Each head holds the pages that its tokens need, and the leaves that name them."""
    held = state.num_pages_held.cpu()
    for tier, layout in enumerate(state.layout.tiers):
        needed = -(-state.num_tokens[..., tier].cpu() // layout.tokens_per_page)
        assert torch.equal(needed, held[..., tier]), (
            f"heads hold other numbers of {layout.format} pages than their tokens need"
        )
    columns = torch.arange(state.directory_width)
    high, low = (-(-held // state.leaf_entries)).unbind(-1)
    owned = (columns < high[..., None]) | (columns >= state.directory_width - low[..., None])
    assert torch.equal(owned, state.directory.cpu() >= 0), (
        "entries of the directory are not where the counts say"
    )
