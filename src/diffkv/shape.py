"""How a budget of bytes is split into pages and tables.

A pool's tables are paid for out of the same bytes as its pages.
"""

from dataclasses import dataclass

from diffkv.layout import CacheLayout, PageLayout
from diffkv.quant import ConfigError

__all__ = [
    "ENTRY_BYTES",
    "FIXED_BYTES",
    "TABLE_ALIGNMENT_BYTES",
    "CacheShape",
    "PoolShape",
    "fixed_bytes",
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
        leaf_entries = self.leaf_entries
        return tuple(
            PoolShape(
                group.page, len(group.layers), self.num_kv_heads, self.num_slots,
                group.page.max_pages(self.max_model_len), self.num_pages, leaf_entries,
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
        """What requests take of the budget: pages, their share of rings and leaves, their tables.

        Shares are rounded up, so that what requests take adds up, at most to the budget.
        """
        leaf_share = -(-_leaf_bytes(self.leaf_entries) // self.leaf_entries)
        page_bytes = self.layout.page_bytes + ENTRY_BYTES + leaf_share
        return num_pages * page_bytes + num_requests * self.slot_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables: what of the budget is not pages."""
        pages = _pages_bytes(0, self.num_pages, self.leaf_entries)
        return self.num_slots * self.slot_bytes + pages + fixed_bytes(len(self.layout.groups))
