"""The work list of attention: every head's pages in chunks, listed flat, so that all are of a size.

A chunk is of one head and one tier. How many pages it has follows from the head's own tokens, and from
whether the batch is a crowd (`attend`): nothing else about other requests changes a result. It grows
with the root of their number: a short head alone on a GPU takes the time of one chunk, and many long
heads the time of all, to which each adds what it costs to begin one and to merge its result.

A chunk of an open row is a power of two and no larger than a leaf of a page table, so that its pages are
named side by side: looking for the leaf of every page in the loop over them, whose loads then depend on
each other three deep, makes attention slower.
"""

import math

import triton
import triton.language as tl

from diffkv.kernels.triton.closed import chain_chunks, list_chains
from diffkv.kernels.triton.constants import chunk_shift, power_of_2
from diffkv.kernels.triton.items import LISTS, item_at, list_start, row_at
from diffkv.kernels.triton.table import leaf_column
from diffkv.layout import PageLayout

__all__ = [
    "CHUNK_TOKENS",
    "MAX_CHUNKS",
    "list_kernel",
    "most_chunk_pages",
    "most_chunks",
    "most_items",
]

MAX_CHUNKS = 64
"""Most chunks of a head where leaves are large enough: one program merges all partial results of one."""

CHUNK_TOKENS = 256
"""Fewest tokens of a chunk, where a head has more: of low ones up to twice as many, for full pages."""

CHUNK_ROOT = 3
"""A chunk has at least so many times the root of its head's tokens."""

_LISTS = tl.constexpr(LISTS)
_ROOT = tl.constexpr(CHUNK_ROOT)
_MOST = tl.constexpr(MAX_CHUNKS)


def most_chunks(table: tuple[int, int]) -> int:
    """Most chunks of a head's open row, as a power of two; `table` is the directory's width and E."""
    return power_of_2(max(MAX_CHUNKS, table[0] + 2))


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
    LONGER: tl.constexpr,
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
            high_chunks, chunks, _, _, _ = chain_chunks(length, TIERS, LONGER)
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
        closed_high, closed, _, _, _ = chain_chunks(length, TIERS, LONGER)
    closed_at = first_closed + tl.cumsum(closed, 0) - closed
    fields = row_at(row_items_ptr, row)
    tl.store(fields, item, mask=exists)
    tl.store(fields + 1, items, mask=exists)
    tl.store(fields + 2, room + closed_at, mask=exists)
    tl.store(fields + 3, closed, mask=exists)
    if start + ROWS >= R_H:
        num_high = first_closed_high + tl.sum(closed_high)
        tl.store(num_items_ptr, first_closed + tl.sum(closed) - num_high)
        tl.store(num_items_ptr + 1, first_low + tl.sum(low_items))
        tl.store(num_items_ptr + 2, num_high)
        tl.store(num_items_ptr + 3, first_high + tl.sum(high_items))
        tl.store(num_items_ptr + _LISTS, programs)
    if CLOSED > 0:
        high_closed_at = first_closed_high + tl.cumsum(closed_high, 0) - closed_high
        list_chains(
            items_ptr, (high_closed_at, closed_at - high_closed_at), room + closed_at, row, slot,
            length, room, closed_room, TIERS, CHAIN_WIDTH, LONGER, CLOSED,
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
    at = item_at(items_ptr, tl.where(is_low, low_at[:, None], high_at[:, None]) + number)
    tl.store(at, row[:, None].broadcast_to(mask.shape), mask=mask)
    tl.store(at + 1, item[:, None] + each, mask=mask)
    tl.store(at + 2, leaf * TABLE.entries + first_page % TABLE.entries, mask=mask)
    tl.store(at + 3, tl.minimum(left, pages * per_page), mask=mask)
    tl.store(at + 4, score_tile[:, None] + skipped, mask=mask)
