"""Chunks of closed rows.

Closed rows are many, and about as long as a segment. How their pages are divided follows from the length
of the chain alone, so that the list is made without a look at them: a chunk is a part of one row, or all
that several have in a tier, and who attends to it looks up its leaves one by one. There may be little in
it, or nothing.
"""

import triton
import triton.language as tl

from diffkv.kernels.triton.items import field_of, item_at, list_start
from diffkv.kernels.triton.table import leaf_entry
from diffkv.layout import PageLayout

__all__ = [
    "CHAIN_CHUNKS",
    "chain_chunks",
    "leaf_of_chain",
    "list_chains",
    "longer",
    "most_closed_chunks",
]

CHAIN_CHUNKS = 32
"""Most chunks of a chain and tier: as many as one program can merge, and enough to fill a GPU."""

SPLITS = (1, 4, 16)
"""Most closed rows of a chain each of which is split in four, in three and in two: a request that is
alone waits for the largest chunk. Where there are two tiers, high tokens are few, and not split."""

SPLIT_TOKENS = 1024
"""Tokens of the rows that `SPLITS` is for. Rows that are n times as long, in short chains, are split in
n times as many."""

_CHAIN_CHUNKS = tl.constexpr(CHAIN_CHUNKS)
_IN_FOUR, _IN_THREE, _IN_TWO = (tl.constexpr(most) for most in SPLITS)


def most_closed_chunks(layout: PageLayout, chain_width: int) -> int:
    """Most chunks of a head's closed rows: a power of two, or 0 where there are no chains."""
    return CHAIN_CHUNKS * len(layout.tiers) if chain_width else 0


def longer(segment: int, is_crowd: bool) -> int:
    """How many times as long as `SPLIT_TOKENS` closed rows are, 1 at least; 0 for a crowd.

    Chunks of a crowd are many, so that rows are split in two at most.
    """
    return 0 if is_crowd else max(1, segment // SPLIT_TOKENS)


@triton.jit
def chain_chunks(length, TIERS: tl.constexpr, LONGER: tl.constexpr):
    """(chunks of the high tier, of all, rows of one, parts of a high row, of a low one), by length."""
    rows = tl.maximum(tl.cdiv(length, _CHAIN_CHUNKS), 1)
    parts = 1 + (length <= _IN_TWO).to(tl.int32)
    if LONGER > 0:
        parts += (length <= _IN_THREE).to(tl.int32) + (length <= _IN_FOUR).to(tl.int32)
    if LONGER > 1:
        parts *= tl.where(length * LONGER <= _IN_THREE, LONGER, 1)
    groups = tl.cdiv(length, rows)
    high_parts = parts
    chunks = groups * parts
    if len(TIERS) > 1:
        high_parts = tl.zeros_like(parts) + 1
        chunks += groups
    return groups * high_parts, chunks, rows, high_parts, parts


@triton.jit
def list_chains(
    items_ptr,
    list_at,
    item,
    row,
    slot,
    length,
    room,
    closed_room,
    TIERS: tl.constexpr,
    CHAIN_WIDTH: tl.constexpr,
    LONGER: tl.constexpr,
    CLOSED: tl.constexpr,
):
    """List the chunks of the closed rows of some rows, the first of which has number `item`.

    Those of a row begin at `list_at`, (high ones, low ones).
    """
    high_chunks, chunks, rows, high_parts, low_parts = chain_chunks(length, TIERS, LONGER)
    each = tl.arange(0, CLOSED)[None, :]
    mask = each < chunks[:, None]
    is_low = each >= high_chunks[:, None]
    number = each - tl.where(is_low, high_chunks[:, None], 0)
    parts = tl.where(is_low, low_parts[:, None], high_parts[:, None])
    first_row = number // parts * rows[:, None]
    high_at = list_start(2, room, closed_room) + list_at[0][:, None]
    low_at = list_start(0, room, closed_room) + list_at[1][:, None]
    at = item_at(items_ptr, tl.where(is_low, low_at, high_at) + number)
    tl.store(at, row[:, None].broadcast_to(mask.shape), mask=mask)
    tl.store(at + 1, item[:, None] + each, mask=mask)
    tl.store(at + 2, slot[:, None] * CHAIN_WIDTH + first_row, mask=mask)
    tl.store(at + 3, tl.minimum(length[:, None] - first_row, rows[:, None]), mask=mask)
    tl.store(at + 4, number % parts, mask=mask)
    tl.store(at + 5, parts, mask=mask)


@triton.jit
def leaf_of_chain(
    chains_ptr,
    num_tokens_ptr,
    directory_ptr,
    items_ptr,
    at,
    place,
    page,
    layer,
    TIER: tl.constexpr,
    TIERS: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    TABLE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """What an item has of a closed row, whose place in the chains is given, in one leaf from a page on.

    Returns the head's row of the tables, the entry of the first page, how many tokens (maybe none), and
    the place and page that follow. All is read again for every leaf, so that nothing of it takes
    registers in the meantime.
    """
    T: tl.constexpr = TIERS[TIER]
    head = field_of(items_ptr, at, 0) % H
    part, parts = field_of(items_ptr, at, 4), field_of(items_ptr, at, 5)
    row = (tl.load(chains_ptr + place) * L + layer) * H + head
    kept = tl.load(num_tokens_ptr + row.to(tl.int64) * 2 + TIER)
    filled = tl.maximum(tl.minimum(parts, tl.cdiv(kept, TOKENS)), 1)
    each = tl.cdiv(tl.cdiv(kept, T.tokens), filled)
    page = tl.maximum(page, part * each)
    end = tl.minimum(kept, (part + 1) * each * T.tokens)
    next_page = (page // TABLE.entries + 1) * TABLE.entries
    num_tokens = tl.minimum(end, next_page * T.tokens) - page * T.tokens
    entry = leaf_entry(directory_ptr, row, page, num_tokens > 0, TIER, TABLE)
    is_last = next_page * T.tokens >= end
    next_page = tl.where(is_last, 0, next_page)
    return row, entry, num_tokens, place + is_last.to(tl.int32), next_page
