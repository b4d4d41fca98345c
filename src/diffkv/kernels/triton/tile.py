"""Device functions of attention: scores and weighted values of one tile of tokens, from their codes.

Scale and zero are applied outside of the products: q . (scale * c + zero) = scale * (q . c) + zero *
sum(q), and likewise for values. Codes enter products as they are stored, so that masks take them out of
a word. Those of keys are whole numbers of 8 bits where enough of them stand side by side; a query head
is then two columns, its upper and its lower digits. Elsewhere a code is a float16 number: its bits are
those of one below the normal ones, c * 2 ** -24, or more where it stands higher.
`S` is a `constants.Side`, `T` a `constants.Tier`.

Tokens are the rows of both products and the query heads their columns, of which a product takes as few
as 8: a group of 4 heads as rows would leave three quarters of every tile idle. Where they are 4, every
other column of a product with values is empty.
"""

# Tuples of tensors grow in kernels by +, for Triton knows no (*a, b)
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from diffkv.kernels.triton.constants import MIN_COLUMNS as _MIN_COLUMNS
from diffkv.kernels.triton.operands import (
    DIGIT,
    ROOM,
    STEPS,
    codes_as_float16,
    codes_as_int8,
    digits,
    word_codes_as_float16,
)
from diffkv.kernels.triton.table import centre_of

__all__ = [
    "MIN_COLUMNS",
    "centre_shift",
    "folded",
    "load_query",
    "part_elements",
    "tile_places",
    "tile_scores",
    "tile_values",
]

MIN_COLUMNS = tl.constexpr(_MIN_COLUMNS)

CENTRE_BLOCK = tl.constexpr(32)
"""Elements of a product with a centre at a time: as many as four threads load, which then add up."""


@triton.jit
def _plane(x, PLANE: tl.constexpr, S: tl.constexpr, DOT: tl.constexpr, FAST: tl.constexpr):
    """One plane of loaded vectors as an operand: 16 bits as they are, codes as numbers."""
    if S.bits == 16:
        y = x.to(DOT)
    else:
        y = codes_as_float16(x, PLANE, S, FAST).to(DOT)
    return y


@triton.jit
def _load_vectors(page_ptr, index, S: tl.constexpr, DTYPE: tl.constexpr):
    """[tokens, padded] bytes, or elements of 16-bit formats."""
    column = tl.arange(0, S.padded)[None, :]
    at = page_ptr[:, None] + (S.codes + index * S.code_bytes)[:, None]
    if S.bits == 16:
        at = at.to(tl.pointer_type(DTYPE))
    if S.padded == S.width:
        x = tl.load(at + column)
    else:
        x = tl.load(at + column, mask=(index[:, None] >= 0) & (column < S.width), other=0)
    return x


@triton.jit
def _load_words(page_ptr, index, S: tl.constexpr, DTYPE: tl.constexpr):
    """[padded_words, tokens] words of codes, or elements of 16-bit formats."""
    column = tl.arange(0, S.padded_words)[:, None]
    at = page_ptr[None, :] + (S.codes + index * S.code_bytes)[None, :]
    if S.bits == 16:
        at = at.to(tl.pointer_type(DTYPE))
    elif S.word == 2:
        at = at.to(tl.pointer_type(tl.int16))
    if S.padded_words * S.word == S.width:
        x = tl.load(at + column)
    else:
        inside = (index[None, :] >= 0) & (column < S.width // S.word)
        x = tl.load(at + column, mask=inside, other=0)
    return x


@triton.jit
def _load_meta(page_ptr, index, GROUP: tl.constexpr, S: tl.constexpr):
    """(scale, zero) of a group of some tokens in float32."""
    at = page_ptr + (S.meta + (index * S.groups + GROUP) * 4)
    word = tl.load(at.to(tl.pointer_type(tl.uint32)))
    scale = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    zero = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def _in_split(SPLIT: tl.constexpr, S: tl.constexpr):
    """[padded, 1]: the elements of a plane that are in one of its groups."""
    column = tl.arange(0, S.padded)[:, None]
    first: tl.constexpr = SPLIT * S.group_dim
    if S.split > 1:
        inside = (column >= first) & (column < first + S.group_dim)
    else:
        inside = column < S.width
    return inside


@triton.jit
def load_query(q_ptr, G: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr, DOT: tl.constexpr):
    """The query heads of a group, by plane and split of the keys: G at q_ptr, padded to GROUP columns.

    Returns operands [padded, GROUP] and the sums of what they are of [GROUP], as tuples, and the factor
    [GROUP] of all scores: with powers of two in all of them that keep numbers in float16's range, and
    make up for where the codes of a plane stand. Of int8 products, operands are [padded, 2 * GROUP], and
    a NaN is in the sums alone.
    """
    g = tl.arange(0, GROUP)[None, :]
    column = tl.arange(0, S.padded)[:, None]
    largest = tl.full([GROUP], 2.0**-100, tl.float32)
    PLANES: tl.constexpr = S.planes
    SPLITS: tl.constexpr = S.split
    planes = ()
    for p in tl.static_range(PLANES):
        at = q_ptr + g * S.head_dim + p * S.width + column
        x = tl.load(at, mask=(g < G) & (column < S.width), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
        planes = planes + (x,)
    if DOT == tl.int8:
        largest *= ROOM
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    factor = exponent.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    if S.bits == 16:
        factor = tl.full([GROUP], 1.0, tl.float32)
        inverse = factor
    operands = ()
    totals = ()
    for p in tl.static_range(PLANES):
        for u in tl.static_range(SPLITS):
            x = tl.where(_in_split(u, S), planes[p] * inverse[None, :], 0.0)
            if DOT == tl.int8:
                x = tl.floor(x * STEPS + 0.5)
                operands = operands + (digits(x),)
                total = tl.sum(x, 0)
            else:
                x = x.to(DOT)
                total = tl.sum(x.to(tl.float32), 0) * S.unit
                if S.bits < 16:
                    x = (x * (1 << (8 - (p + 1) * S.bits))).to(DOT)
                operands = operands + (x,)
            totals = totals + (total,)
    return operands, totals, factor / (STEPS if DOT == tl.int8 else S.unit)


@triton.jit
def centre_shift(
    q_ptr, centres_ptr, row, scale, G: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr
):
    """[GROUP] what a centre adds to the scores, times scale, of the query heads at q_ptr."""
    centre_ptr = centre_of(centres_ptr, row, S)
    g = tl.arange(0, GROUP)[:, None]
    product = tl.zeros([GROUP, CENTRE_BLOCK], tl.float32)
    for start in tl.static_range(0, S.head_dim, CENTRE_BLOCK):
        d = start + tl.arange(0, CENTRE_BLOCK)[None, :]
        q = tl.load(q_ptr + g * S.head_dim + d, mask=(g < G) & (d < S.head_dim), other=0.0)
        # Read by all heads of the group, or the product would be spread as one of them is
        centre = tl.load(centre_ptr + g * 0 + d, mask=(g < G) & (d < S.head_dim), other=0.0)
        product += q.to(tl.float32) * centre.to(tl.float32)
    return tl.sum(product, 1) * scale


@triton.jit
def tile_places(
    pages_ptr, entry_ptr, tile, num_tokens,
    T: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """(page pointer, index in the page, whether there is such a token) of a tile of a chunk.

    The ids of its pages are at `entry_ptr`.
    A token that is none has the place of the chunk's last one, so what is there can be read.
    """
    token = tile * TILE + tl.arange(0, TILE)
    valid = token < num_tokens
    token = tl.minimum(token, num_tokens - 1)
    number = token
    if T.tokens > 1:
        number = tl.umulhi(token.to(tl.uint32), T.reciprocal).to(tl.int32)
    page = tl.load(entry_ptr + number).to(tl.int64)
    return pages_ptr + page * PAGE, token - number * T.tokens, valid


@triton.jit
def tile_scores(
    operands, totals, page_ptr, index, valid,
    S: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """[tokens, GROUP] float32 scores over the query's factor, -inf where there is no token."""
    GROUPS: tl.constexpr = S.groups
    x = _load_vectors(page_ptr, index, S, DTYPE)
    if S.bits == 16:
        scores = tl.dot(_plane(x, 0, S, DOT, FAST), operands[0], input_precision="tf32x3")
    else:
        EACH: tl.constexpr = S.planes * S.split // S.groups  # operands of a group
        for g in tl.static_range(GROUPS):
            total = tl.zeros([GROUP], tl.float32)
            code_scale, zero = _load_meta(page_ptr, index, g, S)
            if DOT == tl.int8:
                both = tl.zeros([page_ptr.shape[0], 2 * GROUP], tl.int32)
                for k in tl.static_range(EACH):
                    code = codes_as_int8(x, (g * EACH + k) // S.split, S, FAST)
                    both = tl.dot(code, operands[g * EACH + k], both, out_dtype=tl.int32)
                    total += totals[g * EACH + k]
                upper, lower = tl.split(tl.reshape(both, [page_ptr.shape[0], GROUP, 2]))
                product = (upper * DIGIT + lower).to(tl.float32)
                if S.bits == 8:
                    zero += code_scale * 128.0
            else:
                product = tl.zeros([page_ptr.shape[0], GROUP], tl.float32)
                for k in tl.static_range(EACH):
                    code = _plane(x, (g * EACH + k) // S.split, S, DOT, FAST)
                    product = tl.dot(
                        code, operands[g * EACH + k], product, input_precision="tf32x3"
                    )
                    total += totals[g * EACH + k]
            term = product * code_scale[:, None] + total[None, :] * zero[:, None]
            scores = term if g == 0 else scores + term
    return tl.where(valid[:, None], scores, float("-inf"))


@triton.jit
def folded(x):
    """[tokens, GROUP] to [8, GROUP]: sums of rows that one thread holds, so that none are exchanged."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 8, 8, x.shape[1]]), 0)


@triton.jit
def _spread(x):
    """[tokens, heads], an operand of a product: of fewer heads than that takes, with empty columns."""
    if x.shape[1] < MIN_COLUMNS:
        column = tl.arange(0, 2)[None, None, :]
        both = tl.where(column == 0, x[:, :, None], 0.0).to(x.dtype)
        x = tl.reshape(both, [x.shape[0], 2 * x.shape[1]])
    return x


@triton.jit
def _weighted(value, weight, HEADS: tl.constexpr):
    """[elements, HEADS]: the product with what `_spread` returned."""
    product = tl.dot(value, weight, input_precision="tf32x3")
    if HEADS < MIN_COLUMNS:
        product, _ = tl.split(tl.reshape(product, [product.shape[0], HEADS, 2]))
    return product


@triton.jit
def tile_values(
    sums, offsets, decay, p, page_ptr, index,
    S: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Add a tile's values, weighted by p [tokens, GROUP], to sums that decay [GROUP].

    sums is a tuple of [padded_words, GROUP], by plane and byte of a word, `S.boost * S.units[part]`
    times too large; offsets one of [8, GROUP], by group: what zeros add to all elements. Returns both.

    Codes are loaded in words of two bytes because the hardware transposes those, and products need
    tokens in pairs. Products of a tile begin at 0 and are added by `fma`, which rounds: matrix units cut
    off what they add to, always downwards.
    """
    GROUPS: tl.constexpr = S.groups
    PARTS: tl.constexpr = S.planes * S.word
    SPLITS: tl.constexpr = S.split
    decays = tl.broadcast_to(decay[None, :], [S.padded_words, decay.shape[0]])
    if S.bits == 16:
        value = _load_words(page_ptr, index, S, DTYPE).to(DOT)
        product = _weighted(value, _spread(p.to(DOT)), decay.shape[0])
        sums = (tl.fma(sums[0], decays, product),)
    else:
        x = _load_words(page_ptr, index, S, DTYPE)
        new_offsets = ()
        weights = ()
        for g in tl.static_range(GROUPS):
            scale, zero = _load_meta(page_ptr, index, g, S)
            weight = (p * (scale * S.boost)[:, None]).to(DOT)
            offset = folded(p * zero[:, None])
            new_offsets = new_offsets + (offsets[g] * decay[None, :] + offset,)
            weights = weights + (_spread(weight),)
        offsets = new_offsets
        new_sums = ()
        for part in tl.static_range(PARTS):
            if S.word == 2:
                code = word_codes_as_float16(x, part, S, FAST).to(DOT)
            else:
                code = codes_as_float16(x, part, S, FAST).to(DOT)
            if S.split == 1:
                weight = weights[part // S.word * S.groups // S.planes]
                product = _weighted(code, weight, decay.shape[0])
            else:
                product = tl.zeros([S.padded_words, decay.shape[0]], tl.float32)
                for u in tl.static_range(SPLITS):
                    weight = weights[part // S.word * S.split + u]
                    term = _weighted(code, weight, decay.shape[0])
                    inside = part_elements(part, S) // S.group_dim % S.split == u
                    product = tl.where(inside[:, None], term, product)
            new_sums = new_sums + (tl.fma(sums[part], decays, product),)
        sums = new_sums
    return sums, offsets


@triton.jit
def part_elements(PART: tl.constexpr, S: tl.constexpr):
    """[padded_words] elements of a vector that the sums of a plane and byte are of."""
    column = tl.arange(0, S.padded_words)
    return PART // S.word * S.width + column * S.word + PART % S.word
