"""The work list of attention: every head's pages in chunks, listed flat, so that all are of a size.

A chunk is of one head and one tier. How many pages it has follows from the head's own tokens alone, so
that results do not depend on which other requests are in a batch. It grows with the root of their
number: a short head alone on a GPU takes the time of one chunk, and many long heads the time of all, to
which each adds what it costs to begin one and to merge its result.

It is a power of two and no larger than a leaf of a page table, so that the pages of a chunk are named
side by side: looking for the leaf of every page in the loop over them, whose loads then depend on each
other three deep, makes attention slower.
"""

import math

import triton
import triton.language as tl

from diffkv.kernels.triton.table import leaf_column
from diffkv.layout import PageLayout

__all__ = [
    "CHUNK_TOKENS",
    "ITEM_FIELDS",
    "MAX_CHUNKS",
    "has_sums",
    "item_of",
    "list_kernel",
    "most_chunk_pages",
    "most_chunks",
    "most_items",
]

MAX_CHUNKS = 64
"""Most chunks of a head where leaves are large enough: one program merges all partial results of one."""

CHUNK_TOKENS = 192
"""Fewest high tokens of a chunk, where a head has more; a chunk of low pages has as many pages."""

CHUNK_ROOT = 3
"""A chunk has at least so many times the root of its head's tokens."""

ITEM_FIELDS = 4
"""int32 fields of an item: row * 2 + tier, entry of the leaves with its first page, tokens, first tile
whose probabilities are kept."""

_FIELDS = tl.constexpr(ITEM_FIELDS)
_ROOT = tl.constexpr(CHUNK_ROOT)
_MOST = tl.constexpr(MAX_CHUNKS)


def most_chunks(table: tuple[int, int]) -> int:
    """Most chunks of a head, as a power of two; `table` is the width of the directory and E."""
    return triton.next_power_of_2(max(MAX_CHUNKS, table[0] + 2))


def most_chunk_pages(layout: PageLayout, table: tuple[int, int], tokens: int = CHUNK_TOKENS) -> int:
    """Pages of the largest chunk that a head can have."""
    return min(table[1], _wanted_pages(layout, table, tokens))


def _wanted_pages(layout: PageLayout, table: tuple[int, int], tokens: int) -> int:
    """Pages of the largest chunk that a head could have if leaves were larger."""
    high, low = layout.high.tokens_per_page, layout.tiers[-1].tokens_per_page
    pages = table[0] * table[1]
    root = math.isqrt(max(0, CHUNK_ROOT**2 * pages * low - 1)) + 1
    wanted = max(-(-max(tokens, root) // high), -(-pages // (MAX_CHUNKS - 2)))
    return triton.next_power_of_2(wanted)


def most_items(
    layout: PageLayout,
    num_rows: int,
    num_pages: int,
    table: tuple[int, int],
    tokens: int = CHUNK_TOKENS,
) -> int:
    """Chunks that rows can have together whose heads hold so many pages, however they share them.

    Where a head's pages have room for n high tokens of h a page, its chunks are at most n / tokens + 2
    and at most sqrt(n) / r + 2 h / tokens + 2, r being CHUNK_ROOT (it may have 2 h tokens less than n).
    That root is below each of its tangents, sqrt(m) / 2 + n / (2 sqrt(m)). Heads whose chunks are no
    larger than that for want of larger leaves have one for each leaf.
    """
    high = layout.high.tokens_per_page
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
    """(slot, high tokens, low tokens, high pages, low pages, pages of a chunk) of some rows."""
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
    chunk = tl.maximum(chunk, tl.cdiv(high_pages + low_pages, _MOST - 2)) - 1
    for shift in tl.static_range(5):
        chunk |= chunk >> (1 << shift)
    return slot, high, low, high_pages, low_pages, tl.minimum(chunk + 1, TABLE.entries)


@triton.jit
def _chunk_tiles(chunk, T: tl.constexpr, TILE: tl.constexpr):
    """Tiles of a chunk of so many pages whose probabilities are kept: none without sums to add to."""
    tiles = tl.zeros_like(chunk)
    if T.tracked:
        tiles = tl.cdiv(chunk * T.tokens, TILE)
    return tiles


@triton.jit(do_not_specialize=["layer", "R_H", "programs"])
def list_kernel(
    slots_ptr,  # [R]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    items_ptr,  # [., ITEM_FIELDS] out
    row_items_ptr,  # [R * H, 2] out: first item of a row, and how many
    num_items_ptr,  # [2] out: items, and the first that no program begins with
    layer,
    R_H,
    programs,
    L: tl.constexpr,
    H: tl.constexpr,
    TABLE: tl.constexpr,
    TIERS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    MAX: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """ROWS rows (request, head) a program. Each counts by itself what is before its rows."""
    HIGH: tl.constexpr = TIERS[0]
    LOW: tl.constexpr = TIERS[len(TIERS) - 1]
    start = tl.program_id(0) * ROWS
    first_item = tl.zeros([], tl.int32)
    first_tile = tl.zeros([], tl.int32)
    for block in range(0, start, COUNT):
        row = block + tl.arange(0, COUNT)
        mask = row < start
        _, _, _, high_pages, low_pages, chunk = _row_chunks(
            slots_ptr, num_tokens_ptr, row, mask, layer, L, H, TABLE, TIERS, TOKENS
        )
        high_items = tl.cdiv(high_pages, chunk)
        low_items = tl.cdiv(low_pages, chunk)
        first_item += tl.sum(high_items + low_items)
        first_tile += tl.sum(
            high_items * _chunk_tiles(chunk, HIGH, TILE)
            + low_items * _chunk_tiles(chunk, LOW, TILE)
        )

    row = start + tl.arange(0, ROWS)
    exists = row < R_H
    slot, high, low, high_pages, low_pages, chunk = _row_chunks(
        slots_ptr, num_tokens_ptr, row, exists, layer, L, H, TABLE, TIERS, TOKENS
    )
    high_items = tl.cdiv(high_pages, chunk)
    low_items = tl.cdiv(low_pages, chunk)
    items = high_items + low_items
    high_tiles = _chunk_tiles(chunk, HIGH, TILE)
    low_tiles = _chunk_tiles(chunk, LOW, TILE)
    tiles = high_items * high_tiles + low_items * low_tiles
    item = first_item + tl.cumsum(items, 0) - items
    score_tile = first_tile + tl.cumsum(tiles, 0) - tiles
    tl.store(row_items_ptr + row * 2, item, mask=exists)
    tl.store(row_items_ptr + row * 2 + 1, items, mask=exists)
    if start + ROWS >= R_H:
        tl.store(num_items_ptr, first_item + tl.sum(items))
        tl.store(num_items_ptr + 1, programs)

    each = tl.arange(0, MAX)[None, :]
    mask = each < items[:, None]
    is_low = each >= high_items[:, None]
    number = each - tl.where(is_low, high_items[:, None], 0)  # of the chunk in its tier
    per_page = tl.where(is_low, LOW.tokens, HIGH.tokens)
    left = tl.where(is_low, low[:, None], high[:, None]) - number * chunk[:, None] * per_page
    skipped = tl.where(is_low, (high_items * high_tiles)[:, None], 0)
    skipped += number * tl.where(is_low, low_tiles[:, None], high_tiles[:, None])
    first_page = number * chunk[:, None]
    leaf = first_page // TABLE.entries
    column = tl.where(is_low, leaf_column(leaf, 1, TABLE), leaf_column(leaf, 0, TABLE))
    head = (slot.to(tl.int64) * L + layer) * H + row % H
    leaf = tl.load(directory_ptr + head[:, None] * TABLE.width + column, mask=mask, other=0)
    at = items_ptr + (item[:, None] + each) * _FIELDS
    tl.store(at, row[:, None] * 2 + is_low.to(tl.int32), mask=mask)
    tl.store(at + 1, leaf * TABLE.entries + first_page % TABLE.entries, mask=mask)
    tl.store(at + 2, tl.minimum(left, chunk[:, None] * per_page), mask=mask)
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
    """(row, tier, entry of the first page, tokens, first tile of kept scores) of an item."""
    at = items_ptr + item * _FIELDS
    row_tier = tl.load(at)
    entry = tl.load(at + 1)
    num_tokens = tl.load(at + 2)
    score_tile = tl.load(at + 3)
    return row_tier // 2, row_tier % 2, entry, num_tokens, score_tile
