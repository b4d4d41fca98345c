"""Rotate vectors, and turn them back."""

import torch
from torch import Tensor

from diffkv.kernels.cpu.check import check_packed, check_tensor
from diffkv.kernels.cpu.library import DTYPES, vectors_library
from diffkv.rotation import block_size

__all__ = ["rotate"]

MAX_DIM = 1024


def rotate(x: Tensor, signs: Tensor, inverse: bool, out: Tensor) -> None:
    """Same contract as `reference.rotate`. Rows of `x` and of `out` may be apart."""
    num_rows, num_heads, head_dim = x.shape
    if x.dtype not in DTYPES or head_dim > MAX_DIM or head_dim % 8:
        raise ValueError(
            f"x must be of {', '.join(map(str, DTYPES))}, with a head_dim of at most {MAX_DIM} and a "
            f"multiple of 8, got {x.dtype} and {head_dim}"
        )
    check_tensor("signs", signs, torch.float32, head_dim)
    row_bytes = check_packed("x", x, x.dtype, num_rows, num_heads, head_dim)
    out_row_bytes = check_packed("out", out, x.dtype, num_rows, num_heads, head_dim)
    vectors_library().rotate(
        x.data_ptr(), num_rows, row_bytes, num_heads, head_dim, block_size(head_dim),
        DTYPES[x.dtype], signs.data_ptr(), inverse, out.data_ptr(), out_row_bytes,
        torch.get_num_threads(),
    )  # fmt: skip
