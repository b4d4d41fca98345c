"""Rotate vectors, and turn them back."""

import torch
from torch import Tensor

from diffkv.kernels.check import check_dtype, check_packed, check_tensor
from diffkv.kernels.cpu.library import CPU, DTYPES, vectors_library
from diffkv.rotation import block_size

__all__ = ["rotate", "rotated"]

MAX_DIM = 1024


def rotate(x: Tensor, signs: Tensor, inverse: bool, out: Tensor) -> None:
    """Same contract as `reference.rotate`. Rows of `x` and of `out` may be apart."""
    num_rows, num_heads, head_dim = x.shape
    check_dtype("x", x.dtype)
    if head_dim > MAX_DIM or head_dim % 8:
        raise ValueError(f"head_dim must be a multiple of 8 up to {MAX_DIM}, got {head_dim}")
    check_tensor("signs", signs, CPU, torch.float32, head_dim)
    row_bytes, out_row_bytes = (
        check_packed(name, tensor, CPU, x.dtype, *x.shape) * x.element_size()
        for name, tensor in (("x", x), ("out", out))
    )
    vectors_library().rotate(
        x.data_ptr(), num_rows, row_bytes, num_heads, head_dim, block_size(head_dim),
        DTYPES[x.dtype], signs.data_ptr(), inverse, out.data_ptr(), out_row_bytes,
        torch.get_num_threads(),
    )  # fmt: skip


def rotated(x: Tensor, signs: Tensor) -> Tensor:
    """What `rotate` makes of vectors, in a tensor of its own."""
    out = torch.empty(x.shape, dtype=x.dtype)
    rotate(x, signs, False, out)
    return out
