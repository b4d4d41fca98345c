"""The work list of attention: every head's pages in chunks, listed flat, so that all are of a size.

A chunk is of one head and one tier. How many pages it has follows from the head's own tokens alone, so
that results do not depend on which other requests are in a batch. It grows with the root of their
number: a short head alone on a GPU takes the time of one chunk, and many long heads the time of all, to
which each adds what it costs to begin one and to merge its result.

A chunk of an open row is a power of two and no larger than a leaf of a page table, so that its pages are
named side by side: looking for the leaf of every page in the loop over them, whose loads then depend on
each other three deep, makes attention slower.

Closed rows are many, and about as long as a segment. How their pages are divided follows from the length
of the chain alone, so that the list is made without a look at them: a chunk is a part of one row, or all
that several have in a tier, and who attends to it looks up its leaves one by one. There may be little in
it, or nothing.
"""

import math

import triton
import triton.language as tl

from diffkv.kernels.triton.constants import chunk_shift, power_of_2
from diffkv.kernels.triton.table import leaf_column, leaf_entry
from diffkv.layout import PageLayout

__all__ = [
    "CHUNK_TOKENS",
    "ITEM_FIELDS",
    "MAX_CHUNKS",
    "ROW_FIELDS",
    "has_sums",
    "item_of",
    "item_of_row",
    "leaf_of_chain",
    "list_kernel",
    "most_chunk_pages",
    "most_chunks",
    "most_closed_chunks",
    "most_items",
    "num_items_of",
]

MAX_CHUNKS = 64
"""Most chunks of a head where leaves are large enough: one program merges all partial results of one."""

CHUNK_TOKENS = 128
"""Fewest tokens of a chunk, where a head has more: of low ones up to twice as many, for full pages."""

CHUNK_ROOT = 3
"""A chunk has at least so many times the root of its head's tokens."""

CHAIN_CHUNKS = 32
"""Most chunks of a chain and tier: as many as one program can merge, and enough to fill a GPU."""

SPLIT_CHAIN = 16
"""Most closed rows of a chain each of which is split in two; one that is alone is split in four. High
tokens are few where there are two tiers: theirs is split half as often."""

ITEM_FIELDS = 6
"""int32 fields of an item: row * 2 + tier, entry of the leaves with its first page, tokens, first tile
whose probabilities are kept. Of closed rows: row * 2 + tier, place of the first one in the chains, how
many, -1; then which part of each, and of how many."""

ROW_FIELDS = 4
"""int32 fields of a row: first item of the open row, how many, first one of closed rows, how many."""

_FIELDS = tl.constexpr(ITEM_FIELDS)
_ROW_FIELDS = tl.constexpr(ROW_FIELDS)
_CHAIN_CHUNKS = tl.constexpr(CHAIN_CHUNKS)
_SPLIT_CHAIN = tl.constexpr(SPLIT_CHAIN)
_ROOT = tl.constexpr(CHUNK_ROOT)
_MOST = tl.constexpr(MAX_CHUNKS)


def most_chunks(table: tuple[int, int]) -> int:
    """Most chunks of a head's open row, as a power of two; `table` is the directory's width and E."""
    return power_of_2(max(MAX_CHUNKS, table[0] + 2))


def most_closed_chunks(layout: PageLayout, chain_width: int) -> int:
    """Most chunks of a head's closed rows: a power of two, or 0 where there are no chains."""
    return CHAIN_CHUNKS * len(layout.tiers) if chain_width else 0


def most_chunk_pages(layout: PageLayout, table: tuple[int, int], tokens: int = CHUNK_TOKENS) -> int:
    """Pages of the largest chunk that a head can have."""
    return min(table[1], _wanted_pages(layout, table, tokens))


def _wanted_pages(layout: PageLayout, table: tuple[int, int], tokens: int) -> int:
    """Pages of the largest chunk that a head could have if leaves were larger."""
    high, low = layout.high.tokens_per_page, layout.tiers[-1].tokens_per_page
    pages = table[0] * table[1]
    root = math.isqrt(max(0, CHUNK_ROOT**2 * pages * low - 1)) + 1
    wanted = max(
        -(-max(tokens, root) // high), -(-(pages << chunk_shift(high, low)) // (MAX_CHUNKS - 2))
    )
    return power_of_2(wanted)


def most_items(
    layout: PageLayout,
    num_rows: int,
    num_pages: int,
    table: tuple[int, int],
    tokens: int = CHUNK_TOKENS,
) -> int:
    """Chunks that open rows can have together whose heads hold so many pages, however they share them.

    Low pages count as the high ones that a chunk has in their place. Where a head's pages have room for
    n high tokens of h a page, its chunks are at most n / tokens + 2
    and at most sqrt(n) / r + 2 h / tokens + 2, r being CHUNK_ROOT (it may have 2 h tokens less than n).
    That root is below each of its tangents, sqrt(m) / 2 + n / (2 sqrt(m)). Heads whose chunks are no
    larger than that for want of larger leaves have one for each leaf.
    """
    high = layout.high.tokens_per_page
    num_pages <<= chunk_shift(high, layout.tiers[-1].tokens_per_page)
    room = num_pages * high
    tangents = (
        (num_rows * root + room // root) // (2 * CHUNK_ROOT) + num_rows * (2 * high // tokens + 1)
        for root in (64, 128)
    )
    most = min(room // tokens, *tangents)
    if _wanted_pages(layout, table, tokens) > table[1]:
        most += num_pages // table[1]
    return min(num_rows * max(MAX_CHUNKS - 2, table[0]), most) + 2 * num_rows + 1


@triton.jit
def _row_chunks(
    slots_ptr, num_tokens_ptr, row, mask, layer,
    L: tl.constexpr, H: tl.constexpr, TABLE: tl.constexpr, TIERS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """(slot, high tokens, low tokens, high pages, low pages, pages of a high and of a low chunk)."""
    LOW: tl.constexpr = TIERS[len(TIERS) - 1]
    slot = tl.load(slots_ptr + row // H, mask=mask, other=-1)
    is_request = slot >= 0
    at = num_tokens_ptr + ((slot.to(tl.int64) * L + layer) * H + row % H) * 2
    high = tl.load(at, mask=is_request, other=0)
    high_pages = tl.cdiv(high, TIERS[0].tokens)
    low = tl.zeros_like(high)
    low_pages = tl.zeros_like(high)
    if len(TIERS) > 1:
        low = tl.load(at + 1, mask=is_request, other=0)
        low_pages = tl.cdiv(low, TIERS[1].tokens)
    root = tl.ceil(tl.sqrt_rn((high + low).to(tl.float32)) * _ROOT).to(tl.int32)
    chunk = tl.cdiv(tl.maximum(root, TOKENS), TIERS[0].tokens)
    # Two tiers may each end in a smaller chunk
    chunk = tl.maximum(chunk, tl.cdiv(high_pages + (low_pages << LOW.shift), _MOST - 2)) - 1
    for shift in tl.static_range(5):
        chunk |= chunk >> (1 << shift)
    low_chunk = tl.minimum(tl.maximum((chunk + 1) >> LOW.shift, 1), TABLE.entries)
    return slot, high, low, high_pages, low_pages, tl.minimum(chunk + 1, TABLE.entries), low_chunk


@triton.jit
def _chunk_tiles(chunk, T: tl.constexpr, TILE: tl.constexpr):
    """Tiles of a chunk of so many pages whose probabilities are kept: none without sums to add to."""
    tiles = tl.zeros_like(chunk)
    if T.tracked:
        tiles = tl.cdiv(chunk * T.tokens, TILE)
    return tiles


@triton.jit
def _chain_chunks(length, TIERS: tl.constexpr):
    """(chunks of the high tier, of all, rows of one, parts of a high row, of a low one), by length."""
    rows = tl.maximum(tl.cdiv(length, _CHAIN_CHUNKS), 1)
    parts = tl.where(length == 1, 4, tl.where(length <= _SPLIT_CHAIN, 2, 1))
    groups = tl.cdiv(length, rows)
    high_parts = parts
    chunks = groups * parts
    if len(TIERS) > 1:
        high_parts = (parts + 1) // 2
        chunks += groups * high_parts
    return groups * high_parts, chunks, rows, high_parts, parts


@triton.jit
def _list_chains(
    items_ptr,
    item,
    row,
    slot,
    length,
    TIERS: tl.constexpr,
    CHAIN_WIDTH: tl.constexpr,
    CLOSED: tl.constexpr,
):
    """List the chunks of the closed rows of some rows, from number `item` on."""
    high_chunks, chunks, rows, high_parts, low_parts = _chain_chunks(length, TIERS)
    each = tl.arange(0, CLOSED)[None, :]
    mask = each < chunks[:, None]
    is_low = each >= high_chunks[:, None]
    number = each - tl.where(is_low, high_chunks[:, None], 0)
    parts = tl.where(is_low, low_parts[:, None], high_parts[:, None])
    first_row = number // parts * rows[:, None]
    at = items_ptr + (item[:, None] + each) * _FIELDS
    tl.store(at, row[:, None] * 2 + is_low.to(tl.int32), mask=mask)
    tl.store(at + 1, slot[:, None] * CHAIN_WIDTH + first_row, mask=mask)
    tl.store(at + 2, tl.minimum(length[:, None] - first_row, rows[:, None]), mask=mask)
    tl.store(at + 3, -1, mask=mask)
    tl.store(at + 4, number % parts, mask=mask)
    tl.store(at + 5, parts, mask=mask)


@triton.jit(do_not_specialize=["layer", "R_H", "programs", "room"])
def list_kernel(
    slots_ptr,  # [R]
    chain_lens_ptr,  # [S]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    items_ptr,  # [., ITEM_FIELDS] out
    row_items_ptr,  # [R * H, ROW_FIELDS] out
    num_items_ptr,  # [3] out: items of open rows, first that no program begins with, of closed ones
    layer,
    R_H,
    programs,
    room,  # the first item of closed rows
    L: tl.constexpr,
    H: tl.constexpr,
    TABLE: tl.constexpr,
    TIERS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    MAX: tl.constexpr,
    CHAIN_WIDTH: tl.constexpr,
    CLOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """ROWS rows (request, head) a program. Each counts by itself what is before its rows."""
    HIGH: tl.constexpr = TIERS[0]
    LOW: tl.constexpr = TIERS[len(TIERS) - 1]
    start = tl.program_id(0) * ROWS
    first_item = tl.zeros([], tl.int32)
    first_tile = tl.zeros([], tl.int32)
    first_closed = tl.zeros([], tl.int32)
    for block in range(0, start, COUNT):
        row = block + tl.arange(0, COUNT)
        mask = row < start
        slot, _, _, high_pages, low_pages, chunk, low_chunk = _row_chunks(
            slots_ptr, num_tokens_ptr, row, mask, layer, L, H, TABLE, TIERS, TOKENS
        )
        high_items = tl.cdiv(high_pages, chunk)
        low_items = tl.cdiv(low_pages, low_chunk)
        first_item += tl.sum(high_items + low_items)
        first_tile += tl.sum(
            high_items * _chunk_tiles(chunk, HIGH, TILE)
            + low_items * _chunk_tiles(low_chunk, LOW, TILE)
        )
        if CLOSED > 0:
            length = tl.load(chain_lens_ptr + slot, mask=slot >= 0, other=0)
            first_closed += tl.sum(_chain_chunks(length, TIERS)[1])

    row = start + tl.arange(0, ROWS)
    exists = row < R_H
    slot, high, low, high_pages, low_pages, chunk, low_chunk = _row_chunks(
        slots_ptr, num_tokens_ptr, row, exists, layer, L, H, TABLE, TIERS, TOKENS
    )
    high_items = tl.cdiv(high_pages, chunk)
    low_items = tl.cdiv(low_pages, low_chunk)
    items = high_items + low_items
    high_tiles = _chunk_tiles(chunk, HIGH, TILE)
    low_tiles = _chunk_tiles(low_chunk, LOW, TILE)
    tiles = high_items * high_tiles + low_items * low_tiles
    item = first_item + tl.cumsum(items, 0) - items
    score_tile = first_tile + tl.cumsum(tiles, 0) - tiles
    closed = tl.zeros_like(items)
    if CLOSED > 0:
        length = tl.load(chain_lens_ptr + slot, mask=slot >= 0, other=0)
        closed = _chain_chunks(length, TIERS)[1]
    closed_item = room + first_closed + tl.cumsum(closed, 0) - closed
    row_at = row_items_ptr + row * _ROW_FIELDS
    tl.store(row_at, item, mask=exists)
    tl.store(row_at + 1, items, mask=exists)
    tl.store(row_at + 2, closed_item, mask=exists)
    tl.store(row_at + 3, closed, mask=exists)
    if start + ROWS >= R_H:
        tl.store(num_items_ptr, first_item + tl.sum(items))
        tl.store(num_items_ptr + 1, programs)
        tl.store(num_items_ptr + 2, first_closed + tl.sum(closed))
    if CLOSED > 0:
        _list_chains(items_ptr, closed_item, row, slot, length, TIERS, CHAIN_WIDTH, CLOSED)

    each = tl.arange(0, MAX)[None, :]
    mask = each < items[:, None]
    is_low = each >= high_items[:, None]
    number = each - tl.where(is_low, high_items[:, None], 0)  # of the chunk in its tier
    per_page = tl.where(is_low, LOW.tokens, HIGH.tokens)
    pages = tl.where(is_low, low_chunk[:, None], chunk[:, None])
    left = tl.where(is_low, low[:, None], high[:, None]) - number * pages * per_page
    skipped = tl.where(is_low, (high_items * high_tiles)[:, None], 0)
    skipped += number * tl.where(is_low, low_tiles[:, None], high_tiles[:, None])
    first_page = number * pages
    leaf = first_page // TABLE.entries
    column = tl.where(is_low, leaf_column(leaf, 1, TABLE), leaf_column(leaf, 0, TABLE))
    head = (slot.to(tl.int64) * L + layer) * H + row % H
    leaf = tl.load(directory_ptr + head[:, None] * TABLE.width + column, mask=mask, other=0)
    at = items_ptr + (item[:, None] + each) * _FIELDS
    tl.store(at, row[:, None] * 2 + is_low.to(tl.int32), mask=mask)
    tl.store(at + 1, leaf * TABLE.entries + first_page % TABLE.entries, mask=mask)
    tl.store(at + 2, tl.minimum(left, pages * per_page), mask=mask)
    tl.store(at + 3, score_tile[:, None] + skipped, mask=mask)


@triton.jit
def has_sums(tier, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Whether tokens of an item's tier have significance sums; low ones only if high ones do."""
    if LOW.tracked:
        found = tier >= 0
    elif HIGH.tracked:
        found = tier == 0
    else:
        found = tier < 0
    return found


@triton.jit
def item_of(items_ptr, item):
    """(row, tier, and the other fields of all items): see `ITEM_FIELDS`."""
    at = items_ptr + item * _FIELDS
    row_tier = tl.load(at)
    return row_tier // 2, row_tier % 2, tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def num_items_of(row_items_ptr, row):
    """How many items a row has, of its open row and of closed ones."""
    at = row_items_ptr + row * _ROW_FIELDS
    return tl.load(at + 1) + tl.load(at + 3)


@triton.jit
def item_of_row(row_items_ptr, row, each):
    """Items number `each` of a row, in the order in which they are merged."""
    at = row_items_ptr + row * _ROW_FIELDS
    num_open = tl.load(at + 1)
    return each + tl.where(each < num_open, tl.load(at), tl.load(at + 2) - num_open)


@triton.jit
def leaf_of_chain(
    chains_ptr,
    num_tokens_ptr,
    directory_ptr,
    items_ptr,
    item,
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
    at = items_ptr + item * _FIELDS
    head, part, parts = tl.load(at) // 2 % H, tl.load(at + 4), tl.load(at + 5)
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
