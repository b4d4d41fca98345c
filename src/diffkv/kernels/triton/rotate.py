"""Rotate vectors, and turn them back.

Many are multiplied by the matrix, which tensor cores do faster than sums; single ones, in kernels that
do something else with them, are added up in two short steps.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_dtype, check_packed, check_tensor
from diffkv.kernels.triton.codes import rounded
from diffkv.kernels.triton.constants import DTYPES, MIN_DOT, cdiv, multiprocessors, power_of_2
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.order import launch_dependents, overlap, wait
from diffkv.rotation import block_size

__all__ = ["matrix_rows", "rotate", "rotated", "rotation_of"]

MIN_ROWS = tl.constexpr(MIN_DOT)

TILE_VECTORS = 32

PROGRAMS = 8
"""For each multiprocessor: each makes the matrix once, and multiplies all of its vectors by it."""

MATRIX_BYTES = 64 << 10
"""Shared memory for rows of the matrix, which every GPU has beside the vectors'."""


@triton.jit
def _signs_of_blocks(
    first, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """K rows of [DP, DP] of 1, -1, 0, which every dtype holds: Hadamard transforms on the diagonal."""
    i = first + tl.arange(0, K)[:, None]
    j = tl.arange(0, DP)[None, :]
    parity = i & j & (BLOCK - 1)
    for shift in tl.static_range(3, -1, -1):
        parity ^= parity >> (1 << shift)
    together = (i // BLOCK == j // BLOCK) & (i < D) & (j < D)
    return tl.where(together, 1 - 2 * (parity & 1), 0).to(DOT)


@triton.jit
def rotated(
    x, sign, norm, DTYPE: tl.constexpr, T: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Rotate [T, DP] float32 vectors, or back; rounded once to the model's dtype. `sign` is [DP]."""
    INNER: tl.constexpr = min(BLOCK, 16)
    OUTER: tl.constexpr = BLOCK // INNER
    if not INVERSE:
        x *= sign[None, :]
    y = tl.reshape(x, [T * DP // INNER, INNER])
    inner = _signs_of_blocks(0, INNER, INNER, INNER, INNER, tl.float32)
    if T * DP // INNER >= MIN_ROWS and INNER >= MIN_ROWS:
        # Triton makes a product of such a sum by itself, which may round what is multiplied
        y = tl.dot(y, inner, input_precision="ieee")
    else:
        y = tl.sum(y[:, :, None] * inner[None, :, :], 1)
    if OUTER > 1:
        y = tl.reshape(y, [T * DP // BLOCK, OUTER, INNER])
        outer = _signs_of_blocks(0, OUTER, OUTER, OUTER, OUTER, tl.float32)
        y = tl.sum(y[:, :, None, :] * outer[None, :, :, None], 1)
    y = tl.reshape(y, [T, DP]) * norm
    if INVERSE:
        y *= sign[None, :]
    return rounded(y, DTYPE)


@triton.jit
def _rotate_tile(
    tile, x_ptr, signs_ptr, output_ptr, x_stride, output_stride, norm, N,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, INVERSE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """B vectors, K of their elements at a time. A sum is rounded once, after it is scaled."""
    vector = (tile * B + tl.arange(0, B)).to(tl.int64)
    row = vector // H
    head = vector % H
    x_at = (row * x_stride + head * D)[:, None]
    y = tl.zeros([B, DP], tl.float32)
    for first in tl.static_range(0, DP, K):
        e = first + tl.arange(0, K)
        mask = (vector < N)[:, None] & (e < D)[None, :]
        x = tl.load(x_ptr + x_at + e[None, :], mask=mask, other=0.0).to(tl.float32)
        if not INVERSE:
            x *= tl.load(signs_ptr + e, mask=e < D, other=0.0)[None, :]
        blocks = _signs_of_blocks(first, K, D, DP, BLOCK, DOT)
        y = tl.dot(x.to(DOT), blocks, y, input_precision=PRECISION)
    y *= norm
    d = tl.arange(0, DP)
    mask = (vector < N)[:, None] & (d < D)[None, :]
    if INVERSE:
        y *= tl.load(signs_ptr + d, mask=d < D, other=0.0)[None, :]
    out_at = (row * output_stride + head * D)[:, None] + d[None, :]
    tl.store(output_ptr + out_at, rounded(y, output_ptr.dtype.element_ty), mask=mask)


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
    K: tl.constexpr,
    PDL: tl.constexpr,
):
    """B vectors a program, or where the whole matrix is there at once, as many as there are."""
    wait(PDL)
    launch_dependents(PDL)
    if K == DP:
        for tile in range(tl.program_id(0), tl.cdiv(N, B), tl.num_programs(0)):
            _rotate_tile(
                tile, x_ptr, signs_ptr, output_ptr, x_stride, output_stride, norm, N, H, D, DP, BLOCK,
                INVERSE, DOT, PRECISION, B, K,
            )  # fmt: skip
    else:
        _rotate_tile(
            tl.program_id(0), x_ptr, signs_ptr, output_ptr, x_stride, output_stride, norm, N, H, D, DP,
            BLOCK, INVERSE, DOT, PRECISION, B, K,
        )  # fmt: skip


def matrix_rows(padded_dim: int, element_bytes: int) -> int:
    """K: rows of the matrix that are multiplied at a time, a power of two."""
    return min(padded_dim, MATRIX_BYTES // (padded_dim * element_bytes))


@dataclass(frozen=True)
class Rotation:
    """A rotation as kernels see it that turn single vectors.

    Attributes:
        signs: [head_dim] float32, or anything where nothing is rotated.
        norm: what sums are multiplied by.
        constants: ROTATED, whether anything is, and BLOCK, channels that are rotated together.
    """

    signs: Tensor
    norm: float
    constants: dict[str, Any]


def rotation_of(signs: Tensor | None, head_dim: int, device: torch.device) -> Rotation:
    """What `rotated` needs for vectors of head_dim; `signs` as the operations take it."""
    size = block_size(head_dim)
    if signs is None:
        return Rotation(_nothing(device), 1.0, {"ROTATED": False, "BLOCK": size})
    check_tensor("signs", signs, device, torch.float32, head_dim)
    return Rotation(signs, size**-0.5, {"ROTATED": True, "BLOCK": size})


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)


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
    padded = max(MIN_DOT, power_of_2(head_dim))
    programs = cdiv(rows * heads, TILE_VECTORS)
    at_once = matrix_rows(padded, x.element_size())
    if at_once == padded:
        programs = min(programs, PROGRAMS * multiprocessors(x.device))
    launch(
        _rotate_kernel, (programs,),
        x, signs, out, *strides, size**-0.5, rows * heads,
        H=heads, D=head_dim, DP=padded, BLOCK=size,
        INVERSE=inverse, DOT=dtype if x.is_cuda else tl.float32,
        PRECISION="ieee", B=TILE_VECTORS, K=at_once, num_warps=4, num_stages=1,
        **overlap(x.device),
    )  # fmt: skip
