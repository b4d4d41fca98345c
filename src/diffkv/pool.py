"""Create a pool inside a memory budget, and look at it from outside.

The pool's tables are paid for out of the same bytes as its pages. What changes a pool is in the
operations; here is only how it begins, what it holds, and what must always be true of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkv import huge_pages
from diffkv.layout import CacheLayout, PageLayout
from diffkv.quant import ConfigError
from diffkv.state import CacheState, PoolState

__all__ = [
    "CacheShape",
    "PoolShape",
    "check_invariants",
    "create",
    "create_cache",
    "held_pages",
    "page_growth",
    "prompt_pages",
]

TABLE_ALIGNMENT_BYTES = 64
RING_ENTRY_BYTES = 4
SLOT_FIXED_BYTES = 3 * 4
"""Thresholds and prompt length of a slot, which all groups of layers share."""


def fixed_bytes(num_groups: int) -> int:
    """Ring ends, the overrun counter, and the rounding of the regions' starts."""
    return (7 + 3 * num_groups) * TABLE_ALIGNMENT_BYTES


FIXED_BYTES = fixed_bytes(1)
"""Where all layers have the same formats."""


@dataclass(frozen=True)
class PoolShape:
    """Pages, and the tables of layers that share a page layout.

    Attributes:
        layout: of a page.
        num_layers: of those layers.
        num_kv_heads: KV heads of a layer, on this rank.
        num_slots: requests that can run at once.
        table_width: page-table entries of a head.
        num_pages: pages of the pool.
    """

    layout: PageLayout
    num_layers: int
    num_kv_heads: int
    num_slots: int
    table_width: int
    num_pages: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of the tables of one slot: page table, two counts of two tiers, thresholds, length."""
        heads = self.num_layers * self.num_kv_heads
        return heads * 4 * (self.table_width + 4) + SLOT_FIXED_BYTES

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables: what of the budget is not pages."""
        return self.num_slots * self.slot_bytes + self.num_pages * RING_ENTRY_BYTES + FIXED_BYTES


@dataclass(frozen=True)
class CacheShape:
    """How a budget of bytes is split into pages and tables of all layers of a model.

    Attributes:
        layout: of every layer's pages.
        num_kv_heads: KV heads of a layer, on this rank.
        num_slots: requests that can run at once.
        max_model_len: tokens of the longest request.
        num_pages: pages of the pool, which all layers share.
    """

    layout: CacheLayout
    num_kv_heads: int
    num_slots: int
    max_model_len: int
    num_pages: int

    @classmethod
    def fit(
        cls,
        budget_bytes: int,
        layout: CacheLayout,
        num_kv_heads: int,
        max_model_len: int,
        max_num_seqs: int,
    ) -> "CacheShape":
        """Split `budget_bytes` so that pages and tables together fit it.

        There is a slot for each of `max_num_seqs` requests, or fewer where the pool cannot hold that
        many requests even of one token: a request holds at least one page for every layer and head.

        Raises:
            ConfigError: the budget does not hold one request of `max_model_len` tokens.
        """
        heads = layout.num_layers * num_kv_heads
        slots = max(1, min(max_num_seqs, budget_bytes // (heads * layout.page_bytes)))
        shape = cls(layout, num_kv_heads, slots, max_model_len, 0)
        num_pages = max(0, budget_bytes - shape.table_bytes) // (
            layout.page_bytes + RING_ENTRY_BYTES
        )
        if num_pages < num_kv_heads * layout.max_pages(max_model_len):
            needed = cls.request_bytes(layout, num_kv_heads, max_model_len)
            raise ConfigError(
                f"a KV budget of {budget_bytes} bytes cannot hold one request of {max_model_len} "
                f"tokens uncompressed ({needed} bytes and tables for {slots} requests): raise the "
                f"budget, or lower max_model_len or max_num_seqs"
            )
        return cls(layout, num_kv_heads, slots, max_model_len, num_pages)

    @staticmethod
    def request_bytes(layout: CacheLayout, num_kv_heads: int, max_model_len: int) -> int:
        """Bytes that one request of `max_model_len` tokens can need: pages, ring entries, tables."""
        tables = CacheShape(layout, num_kv_heads, 1, max_model_len, 0).table_bytes
        pages = num_kv_heads * layout.max_pages(max_model_len)
        return pages * (layout.page_bytes + RING_ENTRY_BYTES) + tables

    @property
    def groups(self) -> tuple[PoolShape, ...]:
        """The shape of each group of layers, in the layout's order."""
        return tuple(
            PoolShape(
                group.page, len(group.layers), self.num_kv_heads, self.num_slots,
                group.page.max_pages(self.max_model_len), self.num_pages,
            )
            for group in self.layout.groups
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """Attention layers of the model."""
        return self.layout.num_layers

    @property
    def slot_bytes(self) -> int:
        """Bytes of the tables of one slot, of all layers."""
        tables = sum(group.slot_bytes - SLOT_FIXED_BYTES for group in self.groups)
        return tables + SLOT_FIXED_BYTES

    def spent_bytes(self, num_pages: int, num_requests: int) -> int:
        """What requests take of the budget: pages, their ring entries, and the requests' tables."""
        page_bytes = self.layout.page_bytes + RING_ENTRY_BYTES
        return num_pages * page_bytes + num_requests * self.slot_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables: what of the budget is not pages."""
        ring = self.num_pages * RING_ENTRY_BYTES
        return self.num_slots * self.slot_bytes + ring + fixed_bytes(len(self.layout.groups))


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
    ring_ends = memory.region((2,), torch.int64)
    ring_ends[1] = one.num_pages
    overruns = memory.region((1,), torch.int32)
    thresholds = memory.region((one.num_slots, 2), torch.float32)
    prompt_lens = memory.region((one.num_slots,), torch.int32)
    tables = []
    for shape in shapes:
        heads = (shape.num_slots, shape.num_layers, shape.num_kv_heads)
        num_tokens = memory.region((*heads, 2), torch.int32)
        num_pages_held = memory.region((*heads, 2), torch.int32)
        page_table = memory.region((*heads, shape.table_width), torch.int32, -1)
        tables.append((page_table, num_tokens, num_pages_held))
    free_ring = memory.region((one.num_pages,), torch.int32, None)
    free_ring.copy_(torch.arange(one.num_pages, dtype=torch.int32))
    # What a page holds before it is written does not matter; a host need not commit its memory yet.
    pages = memory.region((one.num_pages, one.layout.page_bytes), torch.uint8, None)
    return tuple(
        PoolState(
            shape.layout, dtype, window, pages, free_ring, ring_ends, *own, thresholds, prompt_lens,
            overruns,
        )
        for shape, own in zip(shapes, tables, strict=True)
    )  # fmt: skip


def held_pages(state: PoolState, slots: Tensor) -> Tensor:
    """Pages that each of some slots holds: [R] int64."""
    return state.num_pages_held[slots].sum((1, 2, 3))


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

    Args:
        *groups: all groups of layers of one pool.
    """
    state = groups[0]
    head, tail = state.ring_ends.tolist()
    num_free = tail - head
    assert 0 <= num_free <= state.num_pages, f"{num_free} of {state.num_pages} pages are free"
    where = (head + torch.arange(num_free)) % state.num_pages
    free = state.free_ring.cpu()[where].long()
    held = torch.cat([group.page_table.flatten().cpu().long() for group in groups])
    owned = torch.cat([free, held[held >= 0]])
    num_held = sum(int(group.num_pages_held.sum()) for group in groups)
    assert num_free + num_held == state.num_pages, (
        f"{num_free} free + {num_held} held pages are not {state.num_pages}"
    )
    assert torch.equal(owned.sort().values, torch.arange(state.num_pages)), (
        "some page is free or held twice, or not at all"
    )
    for group in groups:
        _check_tables(group)
    assert int(state.overruns) == 0, f"{int(state.overruns)} plans wanted more pages than were free"


def _check_tables(state: PoolState) -> None:
    """Each head holds the pages that its tokens need, and its table has them in their places."""
    for tier, layout in enumerate(state.layout.tiers):
        needed = -(-state.num_tokens[..., tier] // layout.tokens_per_page)
        assert torch.equal(needed, state.num_pages_held[..., tier]), (
            f"heads hold other numbers of {layout.format} pages than their tokens need"
        )
    columns = torch.arange(state.table_width)
    high, low = state.num_pages_held.cpu().unbind(-1)
    owned_columns = (columns < high[..., None]) | (columns >= state.table_width - low[..., None])
    assert torch.equal(owned_columns, state.page_table.cpu() >= 0), (
        "page-table entries are not where the counts say"
    )
