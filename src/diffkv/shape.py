"""Split of a budget of bytes into pages and tables.

A pool's tables are paid for out of the same bytes as its pages.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from diffkv.layout import PageLayout, bf16_bytes_per_token
from diffkv.quant import ConfigError
from diffkv.segments import longest_row, most_rows
from diffkv.state import TENSORS

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

SLOT_FIXED_BYTES = 4 * 4
"""Thresholds, prompt length and length of the chain of a slot."""

CENTRE_BYTES = TENSORS["centres"].dtype.itemsize

FIXED_BYTES = (len(TENSORS) + 1) * TABLE_ALIGNMENT_BYTES
"""Ring ends, the overrun counter, and the rounding of the regions' starts."""

HIGH_SHARE = 0.25
"""Share of a prompt's tokens that must find room in the high tier before an engine starts."""

MORE_ROWS = 32
"""Closed rows of a request beyond twice its segments: each turn of a conversation may add two."""

MOST_ENTRIES = 1 << 30
"""Entries that half-empty leaves may have together, and full ones: kernels number all in 32 bits."""

LEAST_ROWS, MOST_ROWS = 1.25, 4
"""Closed rows for each segment that a pool can hold: those of turns are shorter, and without slots to
spare what is stored of conversations is given up while there is memory for it."""

SPARE_SHARE = 0.01
"""Of a budget, for tables of rows beyond the least."""


def suitable_leaf_entries(max_pages: int) -> int:
    """Pages that a leaf should name where a head has at most so many: a power of two.

    With more, the last leaves of every head are larger; with fewer, its row of the directory is. The two
    are balanced near the root of `max_pages`; this is the largest power of two up to twice that.
    """
    return 1 << ((4 * max(1, max_pages)).bit_length() - 1) // 2


def _segments_within(budget_bytes: int, layout: PageLayout, num_heads: int, segment: int) -> float:
    """Segments that so many bytes hold, of low tokens."""
    token_bytes = min(map(layout.page_token_bytes, range(len(layout.tiers))))
    return budget_bytes / (num_heads * segment * token_bytes)


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
        num_slots: rows that there can be at once, open and closed.
        max_model_len: tokens of the longest request.
        num_pages: pages of the pool, which all layers share.
        leaf_entries: pages that a leaf names, a power of two; 0: what is suitable, or fewer for the
            sake of very many rows.
        segment: tokens after which a row of a prompt is closed; 0: prompts are decided whole.
    """

    layout: PageLayout
    num_layers: int
    num_kv_heads: int
    num_slots: int
    max_model_len: int
    num_pages: int
    leaf_entries: int = 0
    segment: int = 0

    def __post_init__(self) -> None:
        if not self.leaf_entries:
            most = MOST_ENTRIES // max(1, self.num_slots * self.half_empty_leaves)
            entries = min(suitable_leaf_entries(self.max_pages), 1 << max(1, most).bit_length() - 1)
            object.__setattr__(self, "leaf_entries", entries)
        if self.num_leaves * self.leaf_entries > 2 * MOST_ENTRIES:
            raise ConfigError(
                f"a pool of {self.num_pages:,} pages and {self.num_slots:,} rows is too large: lower "
                f"the KV budget or max_num_seqs"
            )

    @classmethod
    def fit(
        cls,
        budget_bytes: int,
        layout: PageLayout,
        num_layers: int,
        num_kv_heads: int,
        max_model_len: int,
        max_num_seqs: int,
        segment: int = 0,
    ) -> "PoolShape":
        """Split `budget_bytes` so that pages and tables together fit it.

        There is an open row for each of `max_num_seqs` requests, or for fewer where the pool cannot hold
        that many requests even of one token: a request holds at least one page for every layer and head.
        There are closed rows for `LEAST_ROWS` times the segments that the pool can hold or more, and one
        for the rest of each request's prompt.

        Raises:
            ConfigError: the budget does not hold one request of `max_model_len` tokens.
        """
        heads = num_layers * num_kv_heads
        slots = cls.slots_within(budget_bytes, layout, heads, max_num_seqs, segment)
        least = cls(layout, num_layers, num_kv_heads, slots, max_model_len, 0, segment=segment)
        for spare in (least.spare_within(budget_bytes), 0):
            empty = replace(least, num_slots=slots + spare, leaf_entries=0)
            num_pages = empty._pages_within(budget_bytes - empty.table_bytes)
            if num_pages >= empty.request_pages(HIGH_SHARE):
                return replace(empty, num_pages=num_pages)
        needed = cls.request_bytes(layout, num_layers, num_kv_heads, max_model_len, segment)
        raise ConfigError(
            f"a KV budget of {budget_bytes} bytes cannot hold one request of {max_model_len} "
            f"tokens, {HIGH_SHARE:.0%} of them high ({needed} bytes, and tables for "
            f"{slots} rows): raise the budget, or lower max_model_len or max_num_seqs"
        )

    @staticmethod
    def slots_within(
        budget_bytes: int, layout: PageLayout, num_heads: int, max_num_seqs: int, segment: int
    ) -> int:
        """Rows that a pool of so many bytes has slots for at least."""
        slots = max(1, min(max_num_seqs, budget_bytes // (num_heads * layout.page_bytes)))
        if not segment:
            return slots
        segments = _segments_within(budget_bytes, layout, num_heads, segment)
        return 2 * slots + math.ceil(LEAST_ROWS * segments)

    def spare_within(self, budget_bytes: int) -> int:
        """Slots that a pool of so many bytes has beyond these, for rows shorter than segments."""
        if not self.segment:
            return 0
        segments = _segments_within(budget_bytes, self.layout, self.num_heads, self.segment)
        paid = SPARE_SHARE * budget_bytes / self.slot_bytes
        return int(min(paid, (MOST_ROWS - LEAST_ROWS) * segments))

    @staticmethod
    def request_bytes(
        layout: PageLayout,
        num_layers: int,
        num_kv_heads: int,
        max_model_len: int,
        segment: int = 0,
        high_share: float = HIGH_SHARE,
    ) -> int:
        """Bytes that one request of `max_model_len` tokens needs: pages, ring entries, tables.

        With `high_share` 1 it is the most that a request can need, however its tokens are tiered.
        """
        one = PoolShape(layout, num_layers, num_kv_heads, 1, max_model_len, 0, segment=segment)
        one = replace(one, num_slots=1 + one.max_rows)
        return one.pages_bytes(one.request_pages(high_share)) + one.table_bytes

    @classmethod
    def least_budget(
        cls,
        layout: PageLayout,
        num_layers: int,
        num_kv_heads: int,
        max_model_len: int,
        max_num_seqs: int,
        segment: int,
        high_share: float = HIGH_SHARE,
    ) -> int:
        """Bytes, in whole pages for every layer, that hold one longest request and all tables.

        More bytes make more slots, each with tables of its own, so the two are raised in turn until
        they agree. One page for every layer is nobody's, as vLLM's first block is.
        """
        heads, block_bytes = num_layers * num_kv_heads, num_layers * layout.page_bytes
        sizes = layout, num_layers, num_kv_heads
        one = cls(*sizes, 1, max_model_len, 0, segment=segment)
        request = cls.request_bytes(*sizes, max_model_len, segment, high_share)
        slots = 0
        while True:
            others = max(0, slots - 1 - one.max_rows) * one.slot_bytes
            budget = block_bytes * (1 + -(-(request + others) // block_bytes))
            within = cls.slots_within(budget, layout, heads, max_num_seqs, segment)
            if within <= slots:
                return budget
            slots = within

    def request_pages(self, high_share: float) -> int:
        """Pages of one request of the longest length, with so many of its tokens high.

        Among them are those of the tokens that wait for the rest of their segment, as they are.
        """
        waiting = min(self.max_model_len, self.longest_row)
        kept = self.max_model_len - waiting
        counts = (
            (kept,) if self.layout.low is None else (kept * high_share, kept * (1 - high_share))
        )
        closed = sum(
            math.ceil(count / tier.tokens_per_page) + self.max_rows
            for count, tier in zip(counts, self.layout.tiers, strict=True)
        )
        return self.num_heads * (closed + self.waiting_pages(waiting))

    def waiting_pages(self, num_tokens: int) -> int:
        """Most pages of a head for waiting tokens of a prompt, as they are or once decided."""
        return max(self.layout.max_pages(num_tokens), self.layout.exact().max_pages(num_tokens))

    @property
    def longest_row(self) -> int:
        """Most tokens of a prompt that wait for the rest of their segment."""
        return longest_row(self.segment) if self.segment else self.max_model_len

    @property
    def max_rows(self) -> int:
        """Closed rows of the longest request, if it is computed from its first token on."""
        return most_rows(self.max_model_len, self.segment)

    @property
    def chain_width(self) -> int:
        """Closed rows that a request can have: some may be shorter than a segment."""
        return 2 * self.max_rows + MORE_ROWS

    @property
    def centre_dim(self) -> int:
        """Elements of a row's centre."""
        return self.layout.head_dim if self.layout.centred else 0

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
        """Most pages of a head in one row."""
        waiting = self.waiting_pages(min(self.max_model_len, self.longest_row))
        return max(waiting, self.layout.max_pages(self.max_model_len))

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

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of the tables of one slot.

        A row of the directory, two counts of two tiers and a centre for each head, leaves that need not
        be full, the chain, thresholds, lengths.
        """
        head_bytes = ENTRY_BYTES * (self.directory_width + 4) + CENTRE_BYTES * self.centre_dim
        rows = self.num_heads * head_bytes + self.chain_width * ENTRY_BYTES
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
