"""Quantise vectors to packed codes and back."""

import torch
from torch import Tensor

from diffkv.quant import FLOAT16_MAX, MIN_SCALE, OUTER, STEPS, STRETCHED_BITS, cut_of

__all__ = ["dequantize", "quantize"]


def quantize(x: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """Quantise vectors to unsigned `bits`-bit codes, asymmetric, one (scale, zero) per group.

    Codes are those of the grid zero = min, scale = (max - min) / (2^bits - 1), both rounded to
    float16. With 1 and 2 bits the range is cut at both ends first (`diffkv.quant.cut_of`), unless a
    quarter of the group is there. With 8 bits this grid is stored; with fewer, the one that gives the
    group back without bias, `_unbiased`. NaN counts as 0; values beyond +-65504, infinities included,
    count as +-65504.

    Codes are packed in planes: element j of a vector is in byte j % code_bytes, at bit
    (j // code_bytes) * bits, where code_bytes = head_dim * bits / 8.

    Args:
        x: [num_vectors, head_dim] float16, bfloat16 or float32. Not modified.
        bits: 1, 2, 4, 8, or 16, which stores the vectors' own bytes.
        groups: groups of neighbouring elements per vector; divides head_dim.

    Returns:
        codes: [num_vectors, code_bytes] uint8.
        meta: [num_vectors, groups, 2] float16, (scale, zero); no group for 16 bits.
    """
    num_vectors, head_dim = x.shape
    if bits == 16:
        codes = (
            x.contiguous()
            .view(torch.uint8)
            .reshape(num_vectors, head_dim * x.element_size())
            .clone()
        )
        return codes, torch.empty(num_vectors, 0, 2, dtype=torch.float16, device=x.device)
    finite = x.float().nan_to_num(nan=0.0, posinf=FLOAT16_MAX, neginf=-FLOAT16_MAX)
    grouped = finite.clamp(-FLOAT16_MAX, FLOAT16_MAX).view(num_vectors, groups, head_dim // groups)
    # -0.0 becomes 0.0: equal values, equal bytes
    range_ = grouped.amin(-1, keepdim=True) + 0.0, grouped.amax(-1, keepdim=True)
    least, most = _ends(grouped, bits, *range_)
    zero = least.half()
    scale = ((most - least) / (2**bits - 1)).clamp(MIN_SCALE, FLOAT16_MAX).half()
    code = ((grouped - zero.float()) / scale.float() + 0.5).floor().clamp(0, 2**bits - 1)
    if bits <= STRETCHED_BITS:
        scale, zero = _unbiased(grouped, code, scale, zero, *range_)

    planes = code.view(num_vectors, 8 // bits, head_dim * bits // 8).to(torch.int32)
    shifts = torch.arange(8 // bits, device=x.device, dtype=torch.int32) * bits
    codes = (planes << shifts[:, None]).sum(1).to(torch.uint8)
    return codes, torch.cat([scale, zero], dim=-1)


def _ends(grouped: Tensor, bits: int, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Least and most of each group that have a code of their own, out of those of the whole group."""
    width = grouped.shape[-1]
    share = cut_of(bits, width)
    if not share:
        return least, most
    span = most - least
    outer = (grouped - least < span * OUTER).sum(-1) + (most - grouped < span * OUTER).sum(-1)
    few = (4 * outer < width)[..., None]
    cut = torch.where(few, span * share, 0.0)
    return least + cut, most - cut


def _unbiased(
    grouped: Tensor, code: Tensor, scale: Tensor, zero: Tensor, least: Tensor, most: Tensor
) -> tuple[Tensor, Tensor]:
    """The (scale, zero) that give a group x back as y with mean(y) = mean(x), cov(x, y) = var(x).

    Codes of few bits shrink what they stand for: y is closest to x where it is shorter, and whatever
    adds up many tokens adds up what is missing, while errors in other directions cancel. So
    scale = var(x) / cov(x, code). Moments are sums of integers, exact in any order.

    Args:
        grouped: [..., width] float32, x.
        code: [..., width] float32.
        scale: [..., 1] float16, the grid of the codes; stays where x or its codes are constant.
        zero: [..., 1] float16, likewise.
        least: [..., 1] float32, least of each group.
        most: [..., 1] float32, most of each group.
    """
    width, span = grouped.shape[-1], most - least
    part = ((grouped - least) / span.clamp_min(MIN_SCALE) * STEPS + 0.5).floor().long()
    codes = code.long()
    sum_part, sum_code = part.sum(-1, keepdim=True), codes.sum(-1, keepdim=True)
    variance = width * (part * part).sum(-1, keepdim=True) - sum_part * sum_part
    covariance = width * (part * codes).sum(-1, keepdim=True) - sum_part * sum_code
    step = span / STEPS
    longer = step * (variance.float() / covariance.clamp_min(1).float())
    longer = longer.clamp(MIN_SCALE, FLOAT16_MAX).half()
    mean = least + step * (sum_part.float() / width)
    base = mean - longer.float() * (sum_code.float() / width)
    base = base.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    varies = (covariance > 0) & (span >= MIN_SCALE)
    return torch.where(varies, longer, scale), torch.where(varies, base, zero)


def dequantize(codes: Tensor, meta: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The vectors that codes stand for: code * scale + zero in float32, then rounded to `dtype`.

    Args:
        codes: [num_vectors, code_bytes] uint8, as `quantize` packs them.
        meta: [num_vectors, groups, 2] float16, (scale, zero).
        bits: 1, 2, 4, 8 or 16.
        dtype: dtype of the result; for 16 bits, the dtype that was stored.

    Returns:
        [num_vectors, head_dim] of `dtype`.
    """
    num_vectors, code_bytes = codes.shape
    if bits == 16:
        return codes.contiguous().view(dtype)
    head_dim, groups = code_bytes * 8 // bits, meta.shape[1]
    shifts = torch.arange(8 // bits, device=codes.device, dtype=torch.int32) * bits
    planes = (codes.to(torch.int32)[:, None, :] >> shifts[:, None]) & (2**bits - 1)
    grouped = planes.float().view(num_vectors, groups, head_dim // groups)
    scale, zero = meta.float().unbind(-1)
    return (grouped * scale[..., None] + zero[..., None]).view(num_vectors, head_dim).to(dtype)
