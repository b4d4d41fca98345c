"""Split of a budget of bytes into pages and tables.

A pool's tables are paid for out of the same bytes as its pages.
"""

from dataclasses import dataclass, replace

from diffkv.layout import PageLayout, bf16_bytes_per_token
from diffkv.quant import ConfigError

__all__ = [
    "ENTRY_BYTES",
    "FIXED_BYTES",
    "TABLE_ALIGNMENT_BYTES",
    "PoolShape",
    "suitable_leaf_entries",
]

TABLE_ALIGNMENT_BYTES = 64
ENTRY_BYTES = 4
"""Bytes of an id, the entry of a ring, a leaf and the directory."""

SLOT_FIXED_BYTES = 3 * 4
"""Thresholds and prompt length of a slot."""

FIXED_BYTES = 13 * TABLE_ALIGNMENT_BYTES
"""Ring ends, the overrun counter, and the rounding of the regions' starts."""


def suitable_leaf_entries(max_pages: int) -> int:
    """Pages that a leaf should name where a head has at most so many: a power of two.

    With more, the last leaves of every head are larger; with fewer, its row of the directory is. The two
    are balanced near the root of `max_pages`; this is the largest power of two up to twice that.
    """
    return 1 << ((4 * max(1, max_pages)).bit_length() - 1) // 2


def _leaf_bytes(leaf_entries: int) -> int:
    """Bytes of a leaf and its entry of the ring."""
    return (leaf_entries + 1) * ENTRY_BYTES


@dataclass(frozen=True)
class PoolShape:
    """Split of a budget of bytes into pages and tables, for all layers of a model.

    Attributes:
        layout: layout of a page.
        num_layers: attention layers of the model.
        num_kv_heads: KV heads of a layer, on this rank.
        num_slots: requests that can run at once.
        max_model_len: tokens of the longest request.
        num_pages: pages of the pool, which all layers share.
        leaf_entries: pages that a leaf names, a power of two; 0: what is suitable.
    """

    layout: PageLayout
    num_layers: int
    num_kv_heads: int
    num_slots: int
    max_model_len: int
    num_pages: int
    leaf_entries: int = 0

    def __post_init__(self) -> None:
        if not self.leaf_entries:
            object.__setattr__(self, "leaf_entries", suitable_leaf_entries(self.max_pages))

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
        slots = max(1, min(max_num_seqs, budget_bytes // (heads * layout.page_bytes)))
        empty = cls(layout, num_layers, num_kv_heads, slots, max_model_len, 0)
        num_pages = empty._pages_within(budget_bytes - empty.table_bytes)
        if num_pages < heads * empty.max_pages:
            needed = cls.request_bytes(layout, num_layers, num_kv_heads, max_model_len)
            raise ConfigError(
                f"a KV budget of {budget_bytes} bytes cannot hold one request of {max_model_len} "
                f"tokens uncompressed ({needed} bytes and tables for {slots} requests): raise the "
                f"budget, or lower max_model_len or max_num_seqs"
            )
        return replace(empty, num_pages=num_pages)

    @staticmethod
    def request_bytes(
        layout: PageLayout, num_layers: int, num_kv_heads: int, max_model_len: int
    ) -> int:
        """Bytes that one request of `max_model_len` tokens can need: pages, ring entries, tables."""
        one = PoolShape(layout, num_layers, num_kv_heads, 1, max_model_len, 0)
        return one.pages_bytes(one.num_heads * one.max_pages) + one.table_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.layout.page_bytes

    @property
    def num_heads(self) -> int:
        """Heads of one slot, of all layers."""
        return self.num_layers * self.num_kv_heads

    @property
    def max_pages(self) -> int:
        """Most pages of a head."""
        return self.layout.max_pages(self.max_model_len)

    @property
    def half_empty_leaves(self) -> int:
        """Leaves of one slot that need not be full: the last one of each tier of each head."""
        return self.num_heads * len(self.layout.tiers)

    @property
    def num_leaves(self) -> int:
        """Leaves of the pool: as many as heads can need that hold all pages between them."""
        return -(-self.num_pages // self.leaf_entries) + self.num_slots * self.half_empty_leaves

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
    def bf16_bytes_per_token(self) -> int:
        """Bytes of a token in bf16, all layers and KV heads of a rank."""
        return bf16_bytes_per_token(self.num_heads, self.layout.head_dim)

    def pages_bytes(self, num_pages: int) -> int:
        """Bytes of pages, their ring entries, and the leaves that name them."""
        return num_pages * self.layout.page_bytes + self._naming_bytes(num_pages)

    def _naming_bytes(self, num_pages: int) -> int:
        """Ring entries and leaves of pages."""
        leaves = -(-num_pages // self.leaf_entries)
        return num_pages * ENTRY_BYTES + leaves * _leaf_bytes(self.leaf_entries)

    def _pages_within(self, budget_bytes: int) -> int:
        """Most pages whose `pages_bytes` are within a budget."""
        leaves, rest = divmod(max(0, budget_bytes), self.pages_bytes(self.leaf_entries))
        rest = max(0, rest - _leaf_bytes(self.leaf_entries))
        return leaves * self.leaf_entries + rest // (self.layout.page_bytes + ENTRY_BYTES)

    def spent_bytes(self, num_pages: int, num_requests: int) -> int:
        """Bytes that requests take: pages, their share of rings and leaves, their tables.

        Shares are rounded up, so that what requests take adds up, at most to the budget.
        """
        leaf_share = -(-_leaf_bytes(self.leaf_entries) // self.leaf_entries)
        page_bytes = self.layout.page_bytes + ENTRY_BYTES + leaf_share
        return num_pages * page_bytes + num_requests * self.slot_bytes

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables: the budget without its pages."""
        naming = self._naming_bytes(self.num_pages)
        return self.num_slots * self.slot_bytes + naming + FIXED_BYTES
