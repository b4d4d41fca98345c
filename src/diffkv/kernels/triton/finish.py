"""The last launches of attention: merge the chunks of every head, and add to the significance sums."""

import triton
import triton.language as tl

from diffkv.kernels.triton.codes import rounded, sum_pointers
from diffkv.kernels.triton.items import (
    field_of,
    item_of,
    item_of_row,
    list_start,
    num_items_of,
    open_list,
)
from diffkv.kernels.triton.order import launch_dependents, wait
from diffkv.kernels.triton.rotate import rotated
from diffkv.kernels.triton.tile import (
    MIN_COLUMNS,
    centre_shift,
    load_query,
    tile_places,
    tile_scores,
)

__all__ = ["finish_kernel", "recompute_kernel"]

LISTED = tl.constexpr(64)
"""Chunks whose log-sum-exps are read at a time; few heads have more."""

LEAST = tl.constexpr(-1.0e30)
"""Below every log-sum-exp but that of a chunk without tokens."""

SMALLEST = tl.constexpr(1.0e-30)
"""Stands in for a sum over no tokens."""

ADDED = tl.constexpr(256)
"""Tokens whose kept probabilities are added at a time."""


@triton.jit
def _merge(
    head, output_ptr, partial_ptr, lse_ptr, row_items_ptr, signs_ptr, norm,
    G: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, MERGED: tl.constexpr,
    BLOCK: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Merge one query head's chunks by their log-sum-exp, and rotate back; 0 if there are none."""
    row = head // G
    count = num_items_of(row_items_ptr, row)
    d = tl.arange(0, D_PADDED)
    most = tl.full([], LEAST, tl.float32)
    total = tl.zeros([], tl.float32)
    out = tl.zeros([D_PADDED], tl.float32)
    for start in range(0, count, MERGED):
        each = start + tl.arange(0, MERGED)
        at = item_of_row(row_items_ptr, row, each).to(tl.int64) * G + head % G
        mask = (each < count)[:, None] & (d < D)[None, :]
        partial = tl.load(partial_ptr + at[:, None] * D + d[None, :], mask=mask, other=0.0)
        lse = tl.load(lse_ptr + at, mask=each < count, other=float("-inf"))
        new_most = tl.maximum(most, tl.max(lse, 0))
        decay = tl.exp2(most - new_most)
        weight = tl.exp2(lse - new_most)
        total = total * decay + tl.sum(weight, 0)
        out = out * decay + tl.sum(partial * weight[:, None], 0)
        most = new_most
    out /= tl.maximum(total, SMALLEST)
    out_ptr = output_ptr + head.to(tl.int64) * D + d
    DTYPE: tl.constexpr = output_ptr.dtype.element_ty
    if ROTATED:
        sign = tl.load(signs_ptr + d, mask=d < D, other=0.0)
        turned = rotated(out[None, :], sign, norm, DTYPE, 1, D_PADDED, BLOCK, True)
        tl.store(out_ptr, tl.reshape(turned, [D_PADDED]), mask=d < D)
    else:
        tl.store(out_ptr, rounded(out, DTYPE), mask=d < D)


@triton.jit
def _row_lse(lse_ptr, row_items_ptr, row, G: tl.constexpr, HEADS: tl.constexpr):
    """[HEADS] log-sum-exp of a head over all its chunks; infinity where there is no query head."""
    count = num_items_of(row_items_ptr, row)
    g = tl.arange(0, HEADS)
    most = tl.full([HEADS], LEAST, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for start in range(0, count, LISTED):
        each = start + tl.arange(0, LISTED)
        at = item_of_row(row_items_ptr, row, each).to(tl.int64)[:, None] * G + g[None, :]
        mask = (each < count)[:, None] & (g < G)[None, :]
        lse = tl.load(lse_ptr + at, mask=mask, other=float("-inf"))
        new_most = tl.maximum(most, tl.max(lse, 0))
        total = total * tl.exp2(most - new_most) + tl.sum(tl.exp2(lse - new_most[None, :]), 0)
        most = new_most
    return tl.where(g < G, most + tl.log2(tl.maximum(total, SMALLEST)), float("inf"))


@triton.jit
def _add(page_ptr, index, valid, growth, T: tl.constexpr):
    """Add to the significance sums of some tokens."""
    sum_ptr = sum_pointers(page_ptr, index, T)
    tl.store(sum_ptr, tl.load(sum_ptr, mask=valid, other=0.0) + growth, mask=valid)


@triton.jit
def _add_kept(
    at, items_ptr, row_items_ptr, lse_ptr, pages_ptr, leaves_ptr, probs_ptr, most_ptr, score_tiles,
    TIERS: tl.constexpr, TIER: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the group's largest probability to the sums of one chunk's tokens, from what was kept."""
    T: tl.constexpr = TIERS[TIER]
    row, _, entry, num_tokens = item_of(items_ptr, at)
    score_tile = field_of(items_ptr, at, 4)
    if score_tile + tl.cdiv(num_tokens, TILE) <= score_tiles:
        g = tl.arange(0, HEADS)
        lse = _row_lse(lse_ptr, row_items_ptr, row, G, HEADS)
        for start in range(0, num_tokens, ADDED):
            page_ptr, index, valid = tile_places(
                pages_ptr, leaves_ptr + entry, start // ADDED, num_tokens, T, ADDED, PAGE
            )
            token = start + tl.arange(0, ADDED)
            tile = (score_tile + token // TILE).to(tl.int64)
            in_group = valid[:, None] & (g < G)[None, :]
            kept = probs_ptr + (score_tile.to(tl.int64) * TILE + token)[:, None] * G + g[None, :]
            p = tl.load(kept, mask=in_group, other=0.0).to(tl.float32)
            most = tl.load(most_ptr + tile[:, None] * G + g[None, :], mask=in_group, other=0.0)
            _add(page_ptr, index, valid, tl.max(p * tl.exp2(most - lse[None, :]), 1), T)


@triton.jit
def _add_recomputed(
    at, items_ptr, row_items_ptr, lse_ptr, slots_ptr, centres_ptr, q_ptr, pages_ptr, leaves_ptr, scale,
    score_tiles, layer,
    TIERS: tl.constexpr, TIER: tl.constexpr, L: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    HEADS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, CENTRED: tl.constexpr,
    RAW_DOT: tl.constexpr, CODE_DOT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Like `_add_kept`, from keys, where nothing was kept."""
    T: tl.constexpr = TIERS[TIER]
    K: tl.constexpr = T.k
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    INT_DOT: tl.constexpr = tl.int8 if K.whole and CODE_DOT == tl.float16 else CODE_DOT
    DOT: tl.constexpr = RAW_DOT if K.bits == 16 else INT_DOT
    GROUP: tl.constexpr = HEADS if HEADS >= MIN_COLUMNS or DOT == tl.int8 else MIN_COLUMNS
    row, _, entry, num_tokens = item_of(items_ptr, at)
    if field_of(items_ptr, at, 4) + tl.cdiv(num_tokens, TILE) > score_tiles:
        lse = _row_lse(lse_ptr, row_items_ptr, row, G, GROUP)
        head_ptr = q_ptr + row.to(tl.int64) * (G * K.head_dim)
        operands, totals, factor = load_query(head_ptr, G, GROUP, K, DOT)
        if CENTRED:
            table_row = (tl.load(slots_ptr + row // H) * L + layer) * H + row % H
            lse -= centre_shift(head_ptr, centres_ptr, table_row, scale, G, GROUP, K)
        for tile in range(0, tl.cdiv(num_tokens, TILE)):
            page_ptr, index, valid = tile_places(
                pages_ptr, leaves_ptr + entry, tile, num_tokens, T, TILE, PAGE
            )
            scores = tile_scores(
                operands, totals, page_ptr, index, valid, K, GROUP, DTYPE, DOT, FAST
            )
            p = tl.exp2(scores * (factor * scale)[None, :] - lse[None, :])
            _add(page_ptr, index, valid, tl.max(p, 1), T)


@triton.jit(do_not_specialize=["score_tiles", "num_heads", "room", "closed_room"])
def finish_kernel(
    output_ptr,  # [R, H * G, D], out
    pages_ptr,  # [num_pages, PAGE], its sums change
    leaves_ptr,  # [num_leaves, E]
    items_ptr,  # [., ITEM_FIELDS]
    num_items_ptr,  # [LISTS + 1]
    row_items_ptr,  # [R * H, ROW_FIELDS]
    partial_ptr,  # [items, G, D] f32
    lse_ptr,  # [items, G] f32, to base 2
    probs_ptr,  # [score_tiles, TILE, G]
    most_ptr,  # [score_tiles, G] f32
    signs_ptr,  # [D] f32
    norm,
    score_tiles,
    num_heads,  # R * H * G
    room,
    closed_room,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    TIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first programs merge a query head each, the others go through open rows' items again."""
    wait(PDL)
    launch_dependents(PDL)
    pid = tl.program_id(0)
    if pid < num_heads:
        _merge(
            pid, output_ptr, partial_ptr, lse_ptr, row_items_ptr, signs_ptr, norm, G, D, D_PADDED,
            MERGED, BLOCK, ROTATED,
        )  # fmt: skip
    else:
        first = pid - num_heads
        step = tl.num_programs(0) - num_heads
        for tier in tl.static_range(len(TIERS)):
            if TIERS[tier].tracked:
                start = list_start(open_list(tier), room, closed_room)
                for item in range(first, tl.load(num_items_ptr + open_list(tier)), step):
                    _add_kept(
                        start + item, items_ptr, row_items_ptr, lse_ptr, pages_ptr, leaves_ptr,
                        probs_ptr, most_ptr, score_tiles, TIERS, tier, G, HEADS, PAGE, TILE,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["score_tiles", "layer", "room", "closed_room"])
def recompute_kernel(
    slots_ptr,  # [R]
    centres_ptr,  # [S, L, H, D or 0] bf16
    q_ptr,  # [R, H * G, D]
    pages_ptr,  # [num_pages, PAGE], its sums change
    leaves_ptr,  # [num_leaves, E]
    items_ptr,  # [., ITEM_FIELDS]
    num_items_ptr,  # [LISTS + 1]
    row_items_ptr,  # [R * H, ROW_FIELDS]
    lse_ptr,  # [items, G] f32, to base 2
    scale,
    score_tiles,
    layer,
    room,
    closed_room,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    TIERS: tl.constexpr,
    CENTRED: tl.constexpr,
    RAW_DOT: tl.constexpr,
    CODE_DOT: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Significance of the items whose probabilities were not kept; usually there are none."""
    wait(PDL)
    first = tl.program_id(0)
    step = tl.num_programs(0)
    for tier in tl.static_range(len(TIERS)):
        if TIERS[tier].tracked:
            start = list_start(open_list(tier), room, closed_room)
            for item in range(first, tl.load(num_items_ptr + open_list(tier)), step):
                _add_recomputed(
                    start + item, items_ptr, row_items_ptr, lse_ptr, slots_ptr, centres_ptr, q_ptr,
                    pages_ptr, leaves_ptr, scale, score_tiles, layer,
                    TIERS, tier, L, H, G, HEADS, PAGE, TILE, CENTRED, RAW_DOT, CODE_DOT, FAST,
                )  # fmt: skip
