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
    "page_ids",
    "prompt_pages",
    "suitable_leaf_entries",
]

TABLE_ALIGNMENT_BYTES = 64
ENTRY_BYTES = 4
"""Of a ring, a leaf and the directory: an id."""

SLOT_FIXED_BYTES = 3 * 4
"""Thresholds and prompt length of a slot, which all groups of layers share."""


def fixed_bytes(num_groups: int) -> int:
    """Ring ends, the overrun counter, and the rounding of the regions' starts."""
    return (10 + 3 * num_groups) * TABLE_ALIGNMENT_BYTES


FIXED_BYTES = fixed_bytes(1)
"""Where all layers have the same formats."""


def suitable_leaf_entries(max_pages: int) -> int:
    """Pages that a leaf should name where a head has at most so many: a power of two.

    With more, the last leaves of every head are larger; with fewer, its row of the directory is. The two
    are balanced near the root of `max_pages`; this is the largest power of two up to twice that.
    """
    return 1 << ((4 * max(1, max_pages)).bit_length() - 1) // 2


def _leaf_bytes(leaf_entries: int) -> int:
    """Of a leaf and its entry of the ring."""
    return (leaf_entries + 1) * ENTRY_BYTES


def _pages_bytes(page_bytes: int, num_pages: int, leaf_entries: int) -> int:
    """What pages take of a budget: themselves, their ring entries, and the leaves that name them."""
    leaves = -(-num_pages // leaf_entries)
    return num_pages * (page_bytes + ENTRY_BYTES) + leaves * _leaf_bytes(leaf_entries)


@dataclass(frozen=True)
class PoolShape:
    """Pages, and the tables of layers that share a page layout.

    Attributes:
        layout: of a page.
        num_layers: of those layers.
        num_kv_heads: KV heads of a layer, on this rank.
        num_slots: requests that can run at once.
        max_pages: most pages of a head.
        num_pages: pages of the pool.
        leaf_entries: pages that a leaf names, a power of two; 0: what is suitable.
    """

    layout: PageLayout
    num_layers: int
    num_kv_heads: int
    num_slots: int
    max_pages: int
    num_pages: int
    leaf_entries: int = 0

    def __post_init__(self) -> None:
        if not self.leaf_entries:
            object.__setattr__(self, "leaf_entries", suitable_leaf_entries(self.max_pages))

    @property
    def num_heads(self) -> int:
        """Heads of one slot, of all layers."""
        return self.num_layers * self.num_kv_heads

    @property
    def half_empty_leaves(self) -> int:
        """Leaves of one slot that need not be full: the last one of each tier of each head."""
        return self.num_heads * len(self.layout.tiers)

    @property
    def directory_width(self) -> int:
        """Leaves that a head can have, whichever tiers its pages are of."""
        return -(-self.max_pages // self.leaf_entries) + len(self.layout.tiers) - 1

    @property
    def slot_bytes(self) -> int:
        """Bytes of the tables of one slot.

        A row of the directory and two counts of two tiers for each head, leaves that need not be full,
        thresholds, length.
        """
        rows = self.num_heads * ENTRY_BYTES * (self.directory_width + 4)
        return rows + self.half_empty_leaves * _leaf_bytes(self.leaf_entries) + SLOT_FIXED_BYTES

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables: what of the budget is not pages."""
        pages = _pages_bytes(0, self.num_pages, self.leaf_entries)
        return self.num_slots * self.slot_bytes + pages + FIXED_BYTES


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
        num_pages = shape._pages_within(budget_bytes - shape.table_bytes)
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
        one = CacheShape(layout, num_kv_heads, 1, max_model_len, 0)
        return one.pages_bytes(num_kv_heads * layout.max_pages(max_model_len)) + one.table_bytes

    @property
    def leaf_entries(self) -> int:
        """Pages that a leaf names, whatever layer's they are."""
        most = max(group.page.max_pages(self.max_model_len) for group in self.layout.groups)
        return suitable_leaf_entries(most)

    @property
    def groups(self) -> tuple[PoolShape, ...]:
        """The shape of each group of layers, in the layout's order."""
        return tuple(
            PoolShape(
                group.page, len(group.layers), self.num_kv_heads, self.num_slots,
                group.page.max_pages(self.max_model_len), self.num_pages, self.leaf_entries,
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

    def pages_bytes(self, num_pages: int) -> int:
        """What pages take of a budget: themselves, their ring entries, and the leaves that name them."""
        return _pages_bytes(self.layout.page_bytes, num_pages, self.leaf_entries)

    def _pages_within(self, budget_bytes: int) -> int:
        """Most pages whose `pages_bytes` are within a budget."""
        leaves, rest = divmod(max(0, budget_bytes), self.pages_bytes(self.leaf_entries))
        rest = max(0, rest - _leaf_bytes(self.leaf_entries))
        return leaves * self.leaf_entries + rest // (self.layout.page_bytes + ENTRY_BYTES)

    def spent_bytes(self, num_pages: int, num_requests: int) -> int:
        """What requests take of the budget: `pages_bytes`, and the requests' tables."""
        return self.pages_bytes(num_pages) + num_requests * self.slot_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables: what of the budget is not pages."""
        pages = _pages_bytes(0, self.num_pages, self.leaf_entries)
        return self.num_slots * self.slot_bytes + pages + fixed_bytes(len(self.layout.groups))


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


def page_ids(state: PoolState, head: tuple[int, int, int], tier: int) -> Tensor:
    """The pages that (slot, layer, head) holds in a tier, first to last: [n] int64."""
    number = torch.arange(int(state.num_pages_held[(*head, tier)]), device=state.leaves.device)
    leaf = number // state.leaf_entries
    column = leaf if tier == 0 else state.directory_width - 1 - leaf
    return state.leaves[state.directory[head][column].long(), number % state.leaf_entries].long()


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
