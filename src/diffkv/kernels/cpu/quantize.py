"""Quantise vectors to packed codes and back."""

import torch
from torch import Tensor

from diffkv.kernels.check import check_dtype, check_format, check_tensor
from diffkv.kernels.cpu.library import CPU, DTYPES, vectors_library

__all__ = ["dequantize", "quantize"]


def quantize(x: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.quantize`. `x` must be contiguous."""
    num_vectors, head_dim = x.shape
    check_format(x.dtype, bits, groups, head_dim)
    check_tensor("x", x, CPU, x.dtype, num_vectors, head_dim)
    if bits == 16:
        codes = x.view(torch.uint8).reshape(num_vectors, head_dim * x.element_size()).clone()
        return codes, torch.empty(num_vectors, 0, 2, dtype=torch.float16)
    codes = torch.empty(num_vectors, head_dim * bits // 8, dtype=torch.uint8)
    meta = torch.empty(num_vectors, groups, 2, dtype=torch.float16)
    vectors_library().quantize(
        x.data_ptr(), num_vectors, head_dim, DTYPES[x.dtype], bits, groups,
        codes.data_ptr(), meta.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes, meta


def dequantize(codes: Tensor, meta: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Same contract as `reference.dequantize`. `codes` and `meta` must be contiguous."""
    num_vectors, code_bytes = codes.shape
    check_tensor("codes", codes, CPU, torch.uint8, num_vectors, code_bytes)
    if bits == 16:
        check_dtype("dtype", dtype)
        return codes.view(dtype).view(num_vectors, -1)
    head_dim, groups = code_bytes * 8 // bits, meta.shape[1]
    check_format(dtype, bits, groups, head_dim)
    check_tensor("meta", meta, CPU, torch.float16, num_vectors, groups, 2)
    x = torch.empty(num_vectors, head_dim, dtype=dtype)
    vectors_library().dequantize(
        codes.data_ptr(), meta.data_ptr(), num_vectors, head_dim, DTYPES[dtype], bits, groups,
        x.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return x
