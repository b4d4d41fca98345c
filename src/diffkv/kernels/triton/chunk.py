"""Device functions of attention: one item of the work list, from the query to a partial output."""

# Tuples of tensors grow in kernels by +, for Triton knows no (*a, b)
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from diffkv.kernels.triton.closed import leaf_of_chain
from diffkv.kernels.triton.items import field_of, item_of
from diffkv.kernels.triton.tile import (
    MIN_COLUMNS,
    centre_shift,
    folded,
    load_query,
    part_elements,
    tile_places,
    tile_scores,
    tile_values,
)

__all__ = ["attend_item"]


@triton.jit
def _attend_tokens(
    most,
    total,
    sums,
    offsets,
    operands,
    totals,
    factor,
    head_ptr,
    centres_ptr,
    table_row,
    scale,
    entry,
    num_tokens,
    score_tile,
    keeps_scores,
    pages_ptr,
    leaves_ptr,
    probs_ptr,
    most_ptr,
    T: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    CENTRED: tl.constexpr,
    DTYPE: tl.constexpr,
    K_DOT: tl.constexpr,
    V_DOT: tl.constexpr,
    FAST: tl.constexpr,
):
    """Attend to some tokens whose pages are named side by side, and return what was accumulated.

    What the centre of their row adds to all scores is left out in the loop.
    """
    K: tl.constexpr = T.k
    V: tl.constexpr = T.v
    g = tl.arange(0, GROUP)
    if CENTRED:
        shift = centre_shift(head_ptr, centres_ptr, table_row, scale, G, GROUP, K)
        most -= shift
    for tile in range(0, tl.cdiv(num_tokens, TILE)):
        page_ptr, index, valid = tile_places(
            pages_ptr, leaves_ptr + entry, tile, num_tokens, T, TILE, PAGE
        )
        scores = tile_scores(operands, totals, page_ptr, index, valid, K, GROUP, DTYPE, K_DOT, FAST)
        new_most = tl.maximum(most, tl.max(scores, 0) * factor)
        decay = tl.exp2(most - new_most)
        most = new_most
        p = tl.exp2(scores * factor[None, :] - most[None, :])
        total = total * decay[None, :] + folded(p)
        if T.tracked:
            kept = (score_tile + tile).to(tl.int64)
            in_group = g < tl.where(keeps_scores, G, 0)
            at = probs_ptr + kept * (TILE * G) + tl.arange(0, TILE)[:, None] * G + g[None, :]
            tl.store(at, p.to(probs_ptr.dtype.element_ty), mask=in_group[None, :])
            whole = most + shift if CENTRED else most
            tl.store(most_ptr + kept * G + g, whole, mask=in_group)
        sums, offsets = tile_values(sums, offsets, decay, p, page_ptr, index, V, DTYPE, V_DOT, FAST)
    if CENTRED:
        most += shift
    return most, total, sums, offsets


@triton.jit
def _together(parts, V: tl.constexpr):
    """What was accumulated of all elements as one tensor, [planes * padded_words * word, GROUP].

    Stored part by part, each would be exchanged between threads by itself.
    """
    COLUMNS: tl.constexpr = parts[0].shape[1]
    PLANES: tl.constexpr = V.planes
    LEVELS: tl.constexpr = PLANES.bit_length() - 1
    if V.word == 2:
        words = ()
        for p in tl.static_range(PLANES):
            both = tl.permute(tl.join(parts[2 * p], parts[2 * p + 1]), (0, 2, 1))
            words = words + (tl.reshape(both, [2 * V.padded_words, COLUMNS]),)
        parts = words
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(PLANES >> (level + 1)):
            both = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (2, 0, 1))
            joined = joined + (tl.reshape(both, [2 * parts[0].shape[0], COLUMNS]),)
        parts = joined
    return parts[0]


@triton.jit
def _store_partial(
    item,
    most,
    total,
    sums,
    offsets,
    partial_ptr,
    lse_ptr,
    V: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    MAY_BE_EMPTY: tl.constexpr,
):
    """Write the partial output of an item and its log-sum-exp, from what was accumulated."""
    PARTS: tl.constexpr = V.planes * V.word
    SPLITS: tl.constexpr = V.split
    ROWS: tl.constexpr = V.padded_words * V.word
    g = tl.arange(0, GROUP)
    total_p = tl.sum(total, 0)
    if MAY_BE_EMPTY:
        total_p = tl.where(total_p > 0.0, total_p, 1.0)  # there may be no token: lse is -inf
    at = (item * G + g).to(tl.int64)
    tl.store(lse_ptr + at, most + tl.log2(total_p), mask=g < G)
    inverse = 1.0 / total_p
    parts = ()
    for part in tl.static_range(PARTS):
        out = sums[part] * (1.0 / (V.boost * V.units[part]))
        if V.bits < 16:
            if V.split == 1:
                offset = offsets[part // V.word * V.groups // V.planes]
                out += tl.sum(offset, 0)[None, :]
            else:
                for u in tl.static_range(SPLITS):
                    in_split = part_elements(part, V) // V.group_dim % V.split == u
                    offset = tl.sum(offsets[part // V.word * V.split + u], 0)
                    out += tl.where(in_split[:, None], offset[None, :], 0.0)
        parts = parts + (out * inverse[None, :],)
    row = tl.arange(0, V.planes * ROWS)
    element = row // ROWS * V.width + row % ROWS
    exists = row % ROWS < V.width
    out = _together(parts, V)
    out_ptr = partial_ptr + at[None, :] * V.head_dim + element[:, None]
    tl.store(out_ptr, out, mask=(g < G)[None, :] & exists[:, None])


@triton.jit
def attend_item(
    at, is_closed, slots_ptr, chains_ptr, directory_ptr, num_tokens_ptr,
    centres_ptr, items_ptr,
    q_ptr, pages_ptr, leaves_ptr, partial_ptr, lse_ptr, probs_ptr, most_ptr, scale, score_tiles, layer,
    TIER: tl.constexpr, TIERS: tl.constexpr, L: tl.constexpr, H: tl.constexpr, TABLE: tl.constexpr,
    G: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    TOKENS: tl.constexpr, CENTRED: tl.constexpr, CHAINED: tl.constexpr,
    RAW_DOT: tl.constexpr, CODE_DOT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One chunk, listed at a place: partial output, log-sum-exp, and probabilities of its tokens.

    Probabilities, relative to the tile's maximum, are kept for the sums of the tier, if it has any, of
    an open row.
    """
    row, item, where, count = item_of(items_ptr, at)
    score_tile = tl.zeros([], tl.int32)
    if TIERS[TIER].tracked:
        score_tile = field_of(items_ptr, at, 4)
    T: tl.constexpr = TIERS[TIER]
    K: tl.constexpr = T.k
    V: tl.constexpr = T.v
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    INT_DOT: tl.constexpr = tl.int8 if K.whole and CODE_DOT == tl.float16 else CODE_DOT
    K_DOT: tl.constexpr = RAW_DOT if K.bits == 16 else INT_DOT
    GROUP: tl.constexpr = HEADS if HEADS >= MIN_COLUMNS or K_DOT == tl.int8 else MIN_COLUMNS
    V_DOT: tl.constexpr = RAW_DOT if V.bits == 16 else CODE_DOT
    PARTS: tl.constexpr = V.planes * V.word
    GROUPS: tl.constexpr = V.groups
    head_ptr = q_ptr + row.to(tl.int64) * (G * K.head_dim)
    operands, totals, factor = load_query(head_ptr, G, GROUP, K, K_DOT)

    factor = factor * scale
    most = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([8, GROUP], tl.float32)
    sums = ()
    for _ in tl.static_range(PARTS):
        sums = sums + (tl.zeros([V.padded_words, GROUP], tl.float32),)
    offsets = ()
    for _ in tl.static_range(GROUPS):
        offsets = offsets + (tl.zeros([8, GROUP], tl.float32),)
    table_row = row
    if CENTRED:
        table_row = (tl.load(slots_ptr + row // H) * L + layer) * H + row % H
    if CHAINED:
        keeps_scores = ~is_closed & (score_tile + tl.cdiv(count, TILE) <= score_tiles)
        place = where
        end_place = where + tl.where(is_closed, count, 1)
        page = 0
        while place < end_place:
            entry = where
            num_tokens = count
            place += 1
            if is_closed:
                table_row, entry, num_tokens, place, page = leaf_of_chain(
                    chains_ptr,
                    num_tokens_ptr,
                    directory_ptr,
                    items_ptr,
                    at,
                    place - 1,
                    page,
                    layer,
                    TIER,
                    TIERS,
                    L,
                    H,
                    TABLE,
                    TOKENS,
                )
            most, total, sums, offsets = _attend_tokens(
                most,
                total,
                sums,
                offsets,
                operands,
                totals,
                factor,
                head_ptr,
                centres_ptr,
                table_row,
                scale,
                entry,
                num_tokens,
                score_tile,
                keeps_scores,
                pages_ptr,
                leaves_ptr,
                probs_ptr,
                most_ptr,
                T,
                G,
                GROUP,
                PAGE,
                TILE,
                CENTRED,
                DTYPE,
                K_DOT,
                V_DOT,
                FAST,
            )
    else:
        keeps_scores = score_tile + tl.cdiv(count, TILE) <= score_tiles
        most, total, sums, offsets = _attend_tokens(
            most,
            total,
            sums,
            offsets,
            operands,
            totals,
            factor,
            head_ptr,
            centres_ptr,
            table_row,
            scale,
            where,
            count,
            score_tile,
            keeps_scores,
            pages_ptr,
            leaves_ptr,
            probs_ptr,
            most_ptr,
            T,
            G,
            GROUP,
            PAGE,
            TILE,
            CENTRED,
            DTYPE,
            K_DOT,
            V_DOT,
            FAST,
        )

    _store_partial(item, most, total, sums, offsets, partial_ptr, lse_ptr, V, G, GROUP, CHAINED)
