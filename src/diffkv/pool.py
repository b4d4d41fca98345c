"""Create a pool inside a memory budget, and look at it from outside.

The pool's tables are paid for out of the same bytes as its pages. What changes a pool is in the
operations; here is only how it begins, what it holds, and what must always be true of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffkv.layout import PageLayout
from diffkv.quant import ConfigError
from diffkv.state import PoolState

__all__ = ["PoolShape", "check_invariants", "create", "held_pages", "page_growth"]

TABLE_ALIGNMENT_BYTES = 64
RING_ENTRY_BYTES = 4
FIXED_BYTES = 10 * TABLE_ALIGNMENT_BYTES
"""Ring ends, the overrun counter, and the rounding of the regions' starts."""


@dataclass(frozen=True)
class PoolShape:
    """How a budget of bytes is split into pages and tables.

    Attributes:
        layout: of a page.
        num_layers: attention layers.
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

    @classmethod
    def fit(
        cls,
        budget_bytes: int,
        layout: PageLayout,
        num_layers: int,
        num_kv_heads: int,
        max_model_len: int,
        max_num_seqs: int,
    ) -> "PoolShape":
        """Split `budget_bytes` so that pages and tables together fit it.

        There is a slot for each of `max_num_seqs` requests, or fewer where the pool cannot hold that
        many requests even of one token: a request holds at least one page for every layer and head.

        Raises:
            ConfigError: the budget does not hold one request of `max_model_len` tokens.
        """
        heads = num_layers * num_kv_heads
        width = layout.max_pages(max_model_len)
        slots = max(1, min(max_num_seqs, budget_bytes // (heads * layout.page_bytes)))
        shape = cls(layout, num_layers, num_kv_heads, slots, width, 0)
        tables = slots * shape.slot_bytes + FIXED_BYTES
        num_pages = max(0, budget_bytes - tables) // (layout.page_bytes + RING_ENTRY_BYTES)
        needed = cls.request_bytes(layout, num_layers, num_kv_heads, max_model_len)
        if num_pages < heads * width:
            raise ConfigError(
                f"a KV budget of {budget_bytes} bytes cannot hold one request of {max_model_len} "
                f"tokens uncompressed ({needed} bytes and tables for {slots} requests): raise the "
                f"budget, or lower max_model_len or max_num_seqs"
            )
        return cls(layout, num_layers, num_kv_heads, slots, width, num_pages)

    @staticmethod
    def request_bytes(
        layout: PageLayout, num_layers: int, num_kv_heads: int, max_model_len: int
    ) -> int:
        """Bytes that one request of `max_model_len` tokens can need: pages, ring entries, tables."""
        width = layout.max_pages(max_model_len)
        shape = PoolShape(layout, num_layers, num_kv_heads, 1, width, 0)
        pages = num_layers * num_kv_heads * width * (layout.page_bytes + RING_ENTRY_BYTES)
        return pages + shape.slot_bytes + FIXED_BYTES

    @property
    def slot_bytes(self) -> int:
        """Bytes of the tables of one slot: page table, two counts of two tiers, thresholds, length."""
        return self.num_layers * self.num_kv_heads * 4 * (self.table_width + 4) + 3 * 4

    def spent_bytes(self, num_pages: int, num_requests: int) -> int:
        """What requests take of the budget: pages, their ring entries, and the requests' tables."""
        page_bytes = self.layout.page_bytes + RING_ENTRY_BYTES
        return num_pages * page_bytes + num_requests * self.slot_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables: what of the budget is not pages."""
        return self.num_slots * self.slot_bytes + self.num_pages * RING_ENTRY_BYTES + FIXED_BYTES


def create(shape: PoolShape, buffer: Tensor, dtype: torch.dtype, window: int) -> PoolState:
    """Make an empty pool inside a buffer: tables first, then pages.

    Args:
        shape: as `PoolShape.fit` found it for a budget of at most the buffer's bytes.
        buffer: [num_bytes] uint8 or int8, contiguous, aligned to 64 bytes.
        dtype: the model's.
        window: recent tokens that always stay high.
    """
    raw = buffer.view(torch.uint8)
    offset = 0

    def region(dims: tuple[int, ...], kind: torch.dtype, fill: float | None) -> Tensor:
        nonlocal offset
        num_bytes = torch.Size(dims).numel() * kind.itemsize
        if offset + num_bytes > raw.numel():
            raise ValueError(f"buffer of {raw.numel()} bytes is too small for {shape}")
        tensor = raw[offset : offset + num_bytes].view(kind).view(dims)
        if fill is not None:
            tensor.fill_(fill)
        offset += -(-num_bytes // TABLE_ALIGNMENT_BYTES) * TABLE_ALIGNMENT_BYTES
        return tensor

    heads = (shape.num_slots, shape.num_layers, shape.num_kv_heads)
    num_pages = shape.num_pages
    ring_ends = region((2,), torch.int64, 0)
    ring_ends[1] = num_pages
    overruns = region((1,), torch.int32, 0)
    thresholds = region((shape.num_slots, 2), torch.float32, 0)
    prompt_lens = region((shape.num_slots,), torch.int32, 0)
    num_tokens = region((*heads, 2), torch.int32, 0)
    num_pages_held = region((*heads, 2), torch.int32, 0)
    page_table = region((*heads, shape.table_width), torch.int32, -1)
    free_ring = region((num_pages,), torch.int32, 0)
    free_ring.copy_(torch.arange(num_pages, dtype=torch.int32))
    # What a page holds before it is written does not matter; a host need not commit its memory yet.
    pages = region((num_pages, shape.layout.page_bytes), torch.uint8, None)
    return PoolState(
        shape.layout, dtype, window, pages, free_ring, ring_ends, page_table, num_tokens,
        num_pages_held, thresholds, prompt_lens, overruns,
    )  # fmt: skip


def held_pages(state: PoolState, slots: Tensor) -> Tensor:
    """Pages that each of some slots holds: [R] int64."""
    return state.num_pages_held[slots].sum((1, 2, 3))


def page_growth(state: PoolState, slots: Tensor, num_tokens: int) -> Tensor:
    """Most pages that `num_tokens` more tokens can add to each of some slots: [R] int64.

    Each token goes to one tier of each head; a tier takes a page when its last one is full.
    """
    slots = slots.long()
    room = [
        state.num_pages_held[slots, :, :, i] * tier.tokens_per_page
        - state.num_tokens[slots, :, :, i]
        for i, tier in enumerate(state.layout.tiers)
    ]
    splits = range(num_tokens + 1) if len(room) > 1 else (num_tokens,)
    worst = torch.zeros_like(room[0])
    for to_high in splits:
        added = torch.zeros_like(worst)
        for count, free, tier in zip(
            (to_high, num_tokens - to_high), room, state.layout.tiers, strict=False
        ):
            added += -(-(count - free).clamp(min=0) // tier.tokens_per_page)
        worst = torch.maximum(worst, added)
    return worst.sum((1, 2))


def check_invariants(state: PoolState) -> None:
    """Raise AssertionError, with its numbers, if a page is lost, owned twice, or held for nothing."""
    head, tail = state.ring_ends.tolist()
    num_free = tail - head
    assert 0 <= num_free <= state.num_pages, f"{num_free} of {state.num_pages} pages are free"
    where = (head + torch.arange(num_free)) % state.num_pages
    free = state.free_ring.cpu()[where].long()
    held = state.page_table.flatten().cpu().long()
    owned = torch.cat([free, held[held >= 0]])
    num_held = int(state.num_pages_held.sum())
    assert num_free + num_held == state.num_pages, (
        f"{num_free} free + {num_held} held pages are not {state.num_pages}"
    )
    assert torch.equal(owned.sort().values, torch.arange(state.num_pages)), (
        "some page is free or held twice, or not at all"
    )
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
    assert int(state.overruns) == 0, f"{int(state.overruns)} plans wanted more pages than were free"
