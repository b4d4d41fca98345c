"""The work list of attention: every head's pages in chunks, listed flat, so that all are of a size.

A chunk is of one head and one tier. How many pages it has follows from the head's own tokens alone, so
that results do not depend on which other requests are in a batch. It grows with the root of their
number: a short head alone on a GPU takes the time of one chunk, and many long heads the time of all, to
which each adds what it costs to begin one and to merge its result.
"""

import math

import triton
import triton.language as tl

from diffkv.layout import PageLayout

__all__ = [
    "CHUNK_TOKENS",
    "ITEM_FIELDS",
    "MAX_CHUNKS",
    "has_sums",
    "item_of",
    "list_kernel",
    "most_chunk_pages",
    "most_items",
]

MAX_CHUNKS = 64
"""Most chunks of a head: partial results of one head are merged by one program."""

CHUNK_TOKENS = 256
"""High tokens of the smallest chunk, where a head has more; a chunk of low pages has as many pages."""

CHUNK_ROOT = 4
"""A chunk has at least so many times the root of its head's tokens."""

ITEM_FIELDS = 8
"""int32 fields of an item: row * 2 + tier, slot, first page, pages, tokens, first kept tile."""

_FIELDS = tl.constexpr(ITEM_FIELDS)
_ROOT = tl.constexpr(CHUNK_ROOT)


def most_chunk_pages(layout: PageLayout, table_width: int, tokens: int = CHUNK_TOKENS) -> int:
    """Pages of the largest chunk that a head can have whose page table has so many columns."""
    high, low = layout.high.tokens_per_page, layout.tiers[-1].tokens_per_page
    root = math.isqrt(max(0, CHUNK_ROOT**2 * table_width * low - 1)) + 1
    return max(-(-max(tokens, root) // high), -(-table_width // (MAX_CHUNKS - 2)))


def most_items(
    layout: PageLayout, num_rows: int, num_pages: int, tokens: int = CHUNK_TOKENS
) -> int:
    """Chunks that rows can have together whose heads hold so many pages, however they share them.

    Where a head's pages have room for n high tokens of h a page, its chunks are at most n / tokens + 2
    and at most sqrt(n) / r + 2 h / tokens + 2, r being CHUNK_ROOT (it may have 2 h tokens less than n).
    That root is below each of its tangents, sqrt(m) / 2 + n / (2 sqrt(m)).
    """
    high = layout.high.tokens_per_page
    room = num_pages * high
    tangents = (
        (num_rows * root + room // root) // (2 * CHUNK_ROOT) + num_rows * (2 * high // tokens + 1)
        for root in (64, 128)
    )
    return min(num_rows * (MAX_CHUNKS - 2), room // tokens, *tangents) + 2 * num_rows + 1


@triton.jit
def _row_chunks(
    slots_ptr, num_tokens_ptr, row, mask, layer,
    L: tl.constexpr, H: tl.constexpr, TIERS: tl.constexpr, TOKENS: tl.constexpr, MAX: tl.constexpr,
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
    chunk = tl.maximum(chunk, tl.cdiv(high_pages + low_pages, MAX - 2))
    return slot, high, low, high_pages, low_pages, chunk


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
    num_tokens_ptr,  # [S, L, H, 2]
    items_ptr,  # [., ITEM_FIELDS] out
    row_items_ptr,  # [R * H, 2] out: first item of a row, and how many
    num_items_ptr,  # [2] out: items, and the first that no program begins with
    layer,
    R_H,
    programs,
    L: tl.constexpr,
    H: tl.constexpr,
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
            slots_ptr, num_tokens_ptr, row, mask, layer, L, H, TIERS, TOKENS, MAX
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
        slots_ptr, num_tokens_ptr, row, exists, layer, L, H, TIERS, TOKENS, MAX
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
    at = items_ptr + (item[:, None] + each) * _FIELDS
    tl.store(at, row[:, None] * 2 + is_low.to(tl.int32), mask=mask)
    tl.store(at + 1, slot[:, None] + tl.zeros_like(each), mask=mask)
    tl.store(at + 2, number * chunk[:, None], mask=mask)
    tl.store(at + 3, tl.minimum(left, chunk[:, None] * per_page), mask=mask)
    tl.store(at + 4, score_tile[:, None] + skipped, mask=mask)


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
    """(row, tier, slot, first page, tokens, first tile of kept scores) of an item."""
    at = items_ptr + item * _FIELDS
    row_tier = tl.load(at)
    slot = tl.load(at + 1)
    first_page = tl.load(at + 2)
    num_tokens = tl.load(at + 3)
    score_tile = tl.load(at + 4)
    return row_tier // 2, row_tier % 2, slot, first_page, num_tokens, score_tile
