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

Low chunks are listed before high ones, for each tier has code of its own, about as much as a
multiprocessor's nearest cache of instructions holds: programs side by side should run the same.
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
    "LISTS",
    "MAX_CHUNKS",
    "ROW_FIELDS",
    "field_of",
    "item_of",
    "item_of_row",
    "leaf_of_chain",
    "list_kernel",
    "list_start",
    "most_chunk_pages",
    "most_chunks",
    "most_closed_chunks",
    "most_items",
    "num_items_of",
]

MAX_CHUNKS = 64
"""Most chunks of a head where leaves are large enough: one program merges all partial results of one."""

CHUNK_TOKENS = 256
"""Fewest tokens of a chunk, where a head has more: of low ones up to twice as many, for full pages."""

CHUNK_ROOT = 3
"""A chunk has at least so many times the root of its head's tokens."""

CHAIN_CHUNKS = 32
"""Most chunks of a chain and tier: as many as one program can merge, and enough to fill a GPU."""

SPLITS = (1, 4, 16)
"""Most closed rows of a chain each of which is split in four, in three and in two: a request that is
alone waits for the largest chunk. Where there are two tiers, high tokens are few, and not split."""

ITEM_FIELDS = 6
"""int32 fields of an item: row, its number, entry of the leaves with its first page, tokens, first tile
whose probabilities are kept. Of closed rows: row, its number, place of the first one in the chains, how
many, which part of each, and of how many."""

LISTS = 4
"""Lists of items, in the order in which they are worked on: low ones of closed rows, of open ones, and
high ones likewise. Each has room for the most items of closed, or of open rows."""

ROW_FIELDS = 4
"""int32 fields of a row: number of the open row's first item, how many it has, and of closed rows."""

_FIELDS = tl.constexpr(ITEM_FIELDS)
_LISTS = tl.constexpr(LISTS)
_ROW_FIELDS = tl.constexpr(ROW_FIELDS)
_CHAIN_CHUNKS = tl.constexpr(CHAIN_CHUNKS)
_IN_FOUR, _IN_THREE, _IN_TWO = (tl.constexpr(most) for most in SPLITS)
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
    parts = 1 + (length <= _IN_TWO).to(tl.int32)
    parts += (length <= _IN_THREE).to(tl.int32) + (length <= _IN_FOUR).to(tl.int32)
    groups = tl.cdiv(length, rows)
    high_parts = parts
    chunks = groups * parts
    if len(TIERS) > 1:
        high_parts = tl.zeros_like(parts) + 1
        chunks += groups
    return groups * high_parts, chunks, rows, high_parts, parts


@triton.jit
def list_start(LIST: tl.constexpr, room, closed_room):
    """Where list number `LIST` begins: see `LISTS`."""
    return closed_room * ((LIST + 1) // 2) + room * (LIST // 2)


@triton.jit
def _list_chains(
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
    CLOSED: tl.constexpr,
):
    """List the chunks of the closed rows of some rows, the first of which has number `item`.

    Those of a row begin at `list_at`, (high ones, low ones).
    """
    high_chunks, chunks, rows, high_parts, low_parts = _chain_chunks(length, TIERS)
    each = tl.arange(0, CLOSED)[None, :]
    mask = each < chunks[:, None]
    is_low = each >= high_chunks[:, None]
    number = each - tl.where(is_low, high_chunks[:, None], 0)
    parts = tl.where(is_low, low_parts[:, None], high_parts[:, None])
    first_row = number // parts * rows[:, None]
    high_at = list_start(2, room, closed_room) + list_at[0][:, None]
    low_at = list_start(0, room, closed_room) + list_at[1][:, None]
    at = items_ptr + (tl.where(is_low, low_at, high_at) + number) * _FIELDS
    tl.store(at, row[:, None].broadcast_to(mask.shape), mask=mask)
    tl.store(at + 1, item[:, None] + each, mask=mask)
    tl.store(at + 2, slot[:, None] * CHAIN_WIDTH + first_row, mask=mask)
    tl.store(at + 3, tl.minimum(length[:, None] - first_row, rows[:, None]), mask=mask)
    tl.store(at + 4, number % parts, mask=mask)
    tl.store(at + 5, parts, mask=mask)


@triton.jit(do_not_specialize=["layer", "R_H", "programs", "room", "closed_room"])
def list_kernel(
    slots_ptr,  # [R]
    chain_lens_ptr,  # [S]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    items_ptr,  # [2 * (room + closed_room), ITEM_FIELDS] out
    row_items_ptr,  # [R * H, ROW_FIELDS] out
    num_items_ptr,  # [LISTS + 1] out: items of each list, and the first that no program begins with
    layer,
    R_H,
    programs,
    room,  # items that there is room for in a list of open rows, and numbers for all of them
    closed_room,  # in one of closed rows
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
    first_high = tl.zeros([], tl.int32)
    first_low = tl.zeros([], tl.int32)
    first_tile = tl.zeros([], tl.int32)
    first_closed_high = tl.zeros([], tl.int32)
    first_closed = tl.zeros([], tl.int32)
    for block in range(0, start, COUNT):
        row = block + tl.arange(0, COUNT)
        mask = row < start
        slot, _, _, high_pages, low_pages, chunk, low_chunk = _row_chunks(
            slots_ptr, num_tokens_ptr, row, mask, layer, L, H, TABLE, TIERS, TOKENS
        )
        high_items = tl.cdiv(high_pages, chunk)
        low_items = tl.cdiv(low_pages, low_chunk)
        first_high += tl.sum(high_items)
        first_low += tl.sum(low_items)
        first_tile += tl.sum(
            high_items * _chunk_tiles(chunk, HIGH, TILE)
            + low_items * _chunk_tiles(low_chunk, LOW, TILE)
        )
        if CLOSED > 0:
            length = tl.load(chain_lens_ptr + slot, mask=slot >= 0, other=0)
            high_chunks, chunks, _, _, _ = _chain_chunks(length, TIERS)
            first_closed_high += tl.sum(high_chunks)
            first_closed += tl.sum(chunks)

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
    high_at = first_high + tl.cumsum(high_items, 0) - high_items
    low_at = first_low + tl.cumsum(low_items, 0) - low_items
    item = high_at + low_at
    score_tile = first_tile + tl.cumsum(tiles, 0) - tiles
    closed = tl.zeros_like(items)
    closed_high = closed
    if CLOSED > 0:
        length = tl.load(chain_lens_ptr + slot, mask=slot >= 0, other=0)
        closed_high, closed, _, _, _ = _chain_chunks(length, TIERS)
    closed_at = first_closed + tl.cumsum(closed, 0) - closed
    row_at = row_items_ptr + row * _ROW_FIELDS
    tl.store(row_at, item, mask=exists)
    tl.store(row_at + 1, items, mask=exists)
    tl.store(row_at + 2, room + closed_at, mask=exists)
    tl.store(row_at + 3, closed, mask=exists)
    if start + ROWS >= R_H:
        num_high = first_closed_high + tl.sum(closed_high)
        tl.store(num_items_ptr, first_closed + tl.sum(closed) - num_high)
        tl.store(num_items_ptr + 1, first_low + tl.sum(low_items))
        tl.store(num_items_ptr + 2, num_high)
        tl.store(num_items_ptr + 3, first_high + tl.sum(high_items))
        tl.store(num_items_ptr + _LISTS, programs)
    if CLOSED > 0:
        high_closed_at = first_closed_high + tl.cumsum(closed_high, 0) - closed_high
        _list_chains(
            items_ptr, (high_closed_at, closed_at - high_closed_at), room + closed_at, row, slot,
            length, room, closed_room, TIERS, CHAIN_WIDTH, CLOSED,
        )  # fmt: skip

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
    high_at += list_start(3, room, closed_room)
    low_at += list_start(1, room, closed_room)
    at = items_ptr + (tl.where(is_low, low_at[:, None], high_at[:, None]) + number) * _FIELDS
    tl.store(at, row[:, None].broadcast_to(mask.shape), mask=mask)
    tl.store(at + 1, item[:, None] + each, mask=mask)
    tl.store(at + 2, leaf * TABLE.entries + first_page % TABLE.entries, mask=mask)
    tl.store(at + 3, tl.minimum(left, pages * per_page), mask=mask)
    tl.store(at + 4, score_tile[:, None] + skipped, mask=mask)


@triton.jit
def item_of(items_ptr, at):
    """(row, number, and the two fields that follow) of what is listed at a place: see `ITEM_FIELDS`."""
    item_ptr = items_ptr + at * _FIELDS
    return (
        tl.load(item_ptr),
        tl.load(item_ptr + 1),
        tl.load(item_ptr + 2),
        tl.load(item_ptr + 3),
    )


@triton.jit
def field_of(items_ptr, at, FIELD: tl.constexpr):
    """One field of what is listed at a place."""
    return tl.load(items_ptr + at * _FIELDS + FIELD)


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
