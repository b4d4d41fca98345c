"""Device functions: vectors to codes and back. Bit-exact, so launch with `enable_fp_fusion=False`.

`S` is a `constants.Side`. A tile of vectors is [T, planes, padded]: element (p, c) of a vector is
element p * width + c, so that all planes of a byte are added up along one axis.
"""

import triton
import triton.language as tl

from diffkv.quant import FLOAT16_MAX, MIN_SCALE, OUTER, STEPS, STRETCHED_BITS

__all__ = [
    "code_pointers",
    "load_elements",
    "meta_pointers",
    "plane_elements",
    "position_pointers",
    "rounded",
    "store_vectors",
    "sum_pointers",
    "write_side",
]

_MAX = tl.constexpr(FLOAT16_MAX)
_MIN_SCALE = tl.constexpr(MIN_SCALE)
_OUTER = tl.constexpr(OUTER)
_STEPS = tl.constexpr(float(STEPS))
_STRETCHED_BITS = tl.constexpr(STRETCHED_BITS)


@triton.jit
def plane_elements(S: tl.constexpr):
    """(element, whether there is one) of a tile, [1, planes, padded] each."""
    plane = tl.arange(0, S.planes)[None, :, None]
    column = tl.arange(0, S.padded)[None, None, :]
    return plane * S.width + column, (plane >= 0) & (column < S.width)


@triton.jit
def code_pointers(page_ptr, index, S: tl.constexpr):
    """Where the codes of token `index` of a page begin."""
    return page_ptr + (S.codes + index * S.code_bytes)


@triton.jit
def meta_pointers(page_ptr, index, S: tl.constexpr):
    """Where the (scale, zero) pairs of token `index` of a page begin."""
    return (page_ptr + (S.meta + index * (S.groups * 4))).to(tl.pointer_type(tl.float16))


@triton.jit
def sum_pointers(page_ptr, index, T: tl.constexpr):
    """Where the significance sum of token `index` of a page is; of a tier that is tracked."""
    return (page_ptr + T.sums + index * 4).to(tl.pointer_type(tl.float32))


@triton.jit
def position_pointers(page_ptr, index, T: tl.constexpr):
    """Where the position of token `index` of a page is; of a tier that is tracked."""
    return (page_ptr + T.positions + index * 4).to(tl.pointer_type(tl.int32))


@triton.jit
def load_elements(code_ptr, meta_ptr, element, mask, S: tl.constexpr, DTYPE: tl.constexpr):
    """Elements of stored vectors in float32, 0 outside the mask; all arguments broadcast."""
    if S.bits == 16:
        x = tl.load(code_ptr.to(tl.pointer_type(DTYPE)) + element, mask=mask, other=0.0)
        x = x.to(tl.float32)
    else:
        byte = tl.load(code_ptr + element % S.width, mask=mask, other=0).to(tl.int32)
        code = (byte >> (element // S.width * S.bits)) & ((1 << S.bits) - 1)
        pair_ptr = meta_ptr + element // S.group_dim * 2
        scale = tl.load(pair_ptr, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(pair_ptr + 1, mask=mask, other=0.0).to(tl.float32)
        x = code.to(tl.float32) * scale + zero
    return x


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 to the model's dtype, ties to even; spelt out because the interpreter's are not."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        half = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        half = tl.where(x == x, half, 0x7FC0)
        y = half.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def _half_scale(scale):
    return tl.minimum(tl.maximum(scale, _MIN_SCALE), _MAX).to(tl.float16)


@triton.jit
def _unbiased(x, code, inside, scale, zero, least, most, S: tl.constexpr):
    """(scale, zero) that give a group back without bias, see `reference._unbiased`.

    x, code, inside: [T, planes, padded]; scale, zero, least, most: [T].
    """
    span = most - least
    wide = tl.broadcast_to(tl.maximum(span, _MIN_SCALE)[:, None, None], x.shape)
    part = tl.floor(tl.div_rn(x - least[:, None, None], wide) * _STEPS + 0.5)
    part = tl.where(inside, part, 0.0).to(tl.int32)
    sum_x = tl.sum(tl.sum(part, axis=2), axis=1)
    sum_c = tl.sum(tl.sum(code, axis=2), axis=1)
    sum_xx = tl.sum(tl.sum(part * part, axis=2), axis=1).to(tl.int64)
    sum_xc = tl.sum(tl.sum(part * code, axis=2), axis=1).to(tl.int64)
    variance = S.group_dim * sum_xx - sum_x.to(tl.int64) * sum_x
    covariance = S.group_dim * sum_xc - sum_x.to(tl.int64) * sum_c
    width = tl.full(span.shape, S.group_dim, tl.float32)
    step = tl.div_rn(span, tl.full(span.shape, _STEPS, tl.float32))
    ratio = tl.div_rn(variance.to(tl.float32), tl.maximum(covariance, 1).to(tl.float32))
    longer = _half_scale(step * ratio)
    mean = least + step * tl.div_rn(sum_x.to(tl.float32), width)
    base = mean - longer.to(tl.float32) * tl.div_rn(sum_c.to(tl.float32), width)
    base = tl.minimum(tl.maximum(base, -_MAX), _MAX).to(tl.float16)
    varies = (covariance > 0) & (span >= _MIN_SCALE)
    return tl.where(varies, longer, scale), tl.where(varies, base, zero)


@triton.jit
def store_vectors(x, code_ptr, meta_ptr, mask, S: tl.constexpr, DTYPE: tl.constexpr):
    """Quantise a tile of vectors and store codes and meta.

    x: [T, planes, padded], any dtype; code_ptr, meta_ptr, mask: [T].
    """
    element, exists = plane_elements(S)
    if S.bits == 16:
        at = code_ptr[:, None, None].to(tl.pointer_type(DTYPE)) + element
        tl.store(at, x.to(DTYPE), mask=mask[:, None, None] & exists)
    else:
        LEVELS: tl.constexpr = (1 << S.bits) - 1.0
        GROUPS: tl.constexpr = S.groups
        x = x.to(tl.float32)
        x = tl.where(x == x, x, 0.0)
        x = tl.minimum(tl.maximum(x, -_MAX), _MAX)
        codes = tl.zeros(x.shape, tl.int32)
        for group in tl.static_range(GROUPS):
            inside = exists & (element // S.group_dim == group)
            least = tl.min(tl.min(tl.where(inside, x, float("inf")), axis=2), axis=1)
            least = least + 0.0  # -0.0 becomes 0.0: equal values, equal bytes
            most = tl.max(tl.max(tl.where(inside, x, float("-inf")), axis=2), axis=1)
            first, last = least, most
            if S.cut > 0:
                span = most - least
                at_low = x - least[:, None, None] < (span * _OUTER)[:, None, None]
                at_high = most[:, None, None] - x < (span * _OUTER)[:, None, None]
                outer = tl.where(inside, at_low.to(tl.int32) + at_high.to(tl.int32), 0)
                few = 4 * tl.sum(tl.sum(outer, axis=2), axis=1) < S.group_dim
                cut = tl.where(few, span * S.cut, 0.0)
                first = least + cut
                last = most - cut
            # div_rn, not /: codes must match the reference bit for bit
            scale = _half_scale(tl.div_rn(last - first, tl.full(least.shape, LEVELS, tl.float32)))
            zero = first.to(tl.float16)
            steps = tl.broadcast_to(scale.to(tl.float32)[:, None, None], x.shape)
            code = tl.floor(tl.div_rn(x - zero.to(tl.float32)[:, None, None], steps) + 0.5)
            code = tl.minimum(tl.maximum(code, 0.0), LEVELS).to(tl.int32)
            code = tl.where(inside, code, 0)
            if S.bits <= _STRETCHED_BITS:
                scale, zero = _unbiased(x, code, inside, scale, zero, least, most, S)
            tl.store(meta_ptr + 2 * group, scale, mask=mask)
            tl.store(meta_ptr + 2 * group + 1, zero, mask=mask)
            codes += code
        shift = tl.arange(0, S.planes)[None, :, None] * S.bits
        packed = tl.sum(codes << shift, axis=1)  # [T, padded]
        column = tl.arange(0, S.padded)[None, :]
        tl.store(
            code_ptr[:, None] + column,
            packed.to(tl.uint8),
            mask=mask[:, None] & (column < S.width),
        )


@triton.jit
def write_side(
    x_ptr,
    centre_ptr,
    page_ptr,
    index,
    mask,
    S: tl.constexpr,
    DTYPE: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Quantise vectors at `x_ptr` into tokens `index` of pages: less their centres, where CENTRED.

    All [T].
    """
    element, exists = plane_elements(S)
    mask_of = mask[:, None, None] & exists
    x = tl.load(x_ptr[:, None, None] + element, mask=mask_of, other=0.0)
    if CENTRED:
        centre = tl.load(centre_ptr[:, None, None] + element, mask=mask_of, other=0.0)
        x = x.to(tl.float32) - centre.to(tl.float32)
    code_ptr = code_pointers(page_ptr, index, S)
    store_vectors(x, code_ptr, meta_pointers(page_ptr, index, S), mask, S, DTYPE)
