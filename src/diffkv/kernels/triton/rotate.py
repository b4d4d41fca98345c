"""Rotate vectors, and turn them back: by a product, which tensor cores do faster than sums."""

import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_dtype, check_packed, check_tensor
from diffkv.kernels.triton.codes import rounded
from diffkv.kernels.triton.constants import DTYPES, MIN_DOT
from diffkv.rotation import block_size

__all__ = ["rotate"]

TILE_VECTORS = 32


@triton.jit
def _signs_of_blocks(D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """[DP, DP] of 1, -1 and 0, which every dtype holds: Hadamard transforms on the diagonal."""
    i = tl.arange(0, DP)[:, None]
    j = tl.arange(0, DP)[None, :]
    parity = i & j & (BLOCK - 1)
    for shift in tl.static_range(3, -1, -1):
        parity ^= parity >> (1 << shift)
    together = (i // BLOCK == j // BLOCK) & (i < D) & (j < D)
    return tl.where(together, 1 - 2 * (parity & 1), 0).to(DOT)


@triton.jit(do_not_specialize=["N"])
def _rotate_kernel(
    x_ptr,  # [., H, D]
    signs_ptr,  # [D] f32
    output_ptr,  # [., H, D], out
    x_stride,
    output_stride,
    norm,
    N,  # vectors
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    B: tl.constexpr,
):
    """B vectors a program. A sum is rounded once, after it is scaled."""
    vector = (tl.program_id(0) * B + tl.arange(0, B)).to(tl.int64)
    d = tl.arange(0, DP)
    mask = (vector < N)[:, None] & (d < D)[None, :]
    row = vector // H
    head = vector % H
    at = (row * x_stride + head * D)[:, None] + d[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    flips = tl.load(signs_ptr + d, mask=d < D, other=0.0)[None, :]
    if not INVERSE:
        x *= flips
    blocks = _signs_of_blocks(D, DP, BLOCK, DOT)
    rotated = tl.dot(x.to(DOT), blocks, input_precision=PRECISION) * norm
    if INVERSE:
        rotated *= flips
    out_at = (row * output_stride + head * D)[:, None] + d[None, :]
    tl.store(output_ptr + out_at, rounded(rotated, output_ptr.dtype.element_ty), mask=mask)


def rotate(x: Tensor, signs: Tensor, inverse: bool, out: Tensor) -> None:
    """Same contract as `reference.rotate`. Rows of `x` and of `out` may be apart."""
    rows, heads, head_dim = x.shape
    check_dtype("x", x.dtype)
    strides = [
        check_packed(name, tensor, x.device, x.dtype, rows, heads, head_dim)
        for name, tensor in (("x", x), ("out", out))
    ]
    check_tensor("signs", signs, x.device, signs.dtype, head_dim)
    if not rows:
        return
    size, dtype = block_size(head_dim), DTYPES[x.dtype]
    _rotate_kernel[(triton.cdiv(rows * heads, TILE_VECTORS),)](
        x, signs, out, *strides, size**-0.5, rows * heads,
        H=heads, D=head_dim, DP=max(MIN_DOT, triton.next_power_of_2(head_dim)), BLOCK=size,
        INVERSE=inverse, DOT=dtype if x.is_cuda else tl.float32,
        PRECISION="ieee", B=TILE_VECTORS, num_warps=4,
    )  # fmt: skip
