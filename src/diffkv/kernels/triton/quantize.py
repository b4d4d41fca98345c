"""Quantise vectors to packed codes and back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_dtype, check_format, check_tensor
from diffkv.kernels.triton.codes import load_elements, plane_elements, rounded, store_vectors
from diffkv.kernels.triton.constants import TILE_WARPS, cdiv, tile_vectors, vector_side
from diffkv.kernels.triton.launch import launch

__all__ = ["dequantize", "quantize"]


@triton.jit
def _quantize_kernel(
    x_ptr,  # [N, D]
    codes_ptr,  # [N, code_bytes] u8
    meta_ptr,  # [N, groups, 2] f16
    N,
    S: tl.constexpr,
    T: tl.constexpr,
):
    vector = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    mask = vector < N
    element, exists = plane_elements(S)
    at = x_ptr + vector[:, None, None] * S.head_dim + element
    x = tl.load(at, mask=mask[:, None, None] & exists, other=0.0)
    meta = meta_ptr + vector * (S.groups * 2)
    store_vectors(x, codes_ptr + vector * S.code_bytes, meta, mask, S, x_ptr.dtype.element_ty)


@triton.jit
def _dequantize_kernel(
    codes_ptr,  # [N, code_bytes] u8
    meta_ptr,  # [N, groups, 2] f16
    x_ptr,  # [N, D]
    N,
    S: tl.constexpr,
    T: tl.constexpr,
):
    vector = (tl.program_id(0).to(tl.int64) * T + tl.arange(0, T))[:, None, None]
    element, exists = plane_elements(S)
    mask = (vector < N) & exists
    code_ptr = codes_ptr + vector * S.code_bytes
    meta = meta_ptr + vector * (S.groups * 2)
    x = load_elements(code_ptr, meta, element, mask, S, x_ptr.dtype.element_ty)
    at = x_ptr + vector * S.head_dim + element
    tl.store(at, rounded(x, x_ptr.dtype.element_ty), mask=mask)


def quantize(x: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """Same contract as `reference.quantize`. `x` must be contiguous."""
    num_vectors, head_dim = x.shape
    check_format(x.dtype, bits, groups, head_dim)
    check_tensor("x", x, x.device, x.dtype, num_vectors, head_dim)
    if bits == 16:
        codes = x.view(torch.uint8).reshape(num_vectors, -1).clone()
        return codes, torch.empty(num_vectors, 0, 2, dtype=torch.float16, device=x.device)
    codes = torch.empty(num_vectors, head_dim * bits // 8, dtype=torch.uint8, device=x.device)
    meta = torch.empty(num_vectors, groups, 2, dtype=torch.float16, device=x.device)
    tile = tile_vectors(head_dim)
    if num_vectors:
        launch(
            _quantize_kernel, (cdiv(num_vectors, tile),),
            x, codes, meta, num_vectors, S=vector_side(bits, groups, head_dim), T=tile,
            num_warps=TILE_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, meta


def dequantize(codes: Tensor, meta: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Same contract as `reference.dequantize`. `codes` and `meta` must be contiguous."""
    num_vectors, code_bytes = codes.shape
    check_tensor("codes", codes, codes.device, torch.uint8, num_vectors, code_bytes)
    if bits == 16:
        check_dtype("dtype", dtype)
        return codes.view(dtype).view(num_vectors, -1)
    head_dim, groups = code_bytes * 8 // bits, meta.shape[1]
    check_format(dtype, bits, groups, head_dim)
    check_tensor("meta", meta, codes.device, torch.float16, num_vectors, groups, 2)
    x = torch.empty(num_vectors, head_dim, dtype=dtype, device=codes.device)
    tile = tile_vectors(head_dim)
    if num_vectors:
        launch(
            _dequantize_kernel, (cdiv(num_vectors, tile),),
            codes, meta, x, num_vectors, S=vector_side(bits, groups, head_dim), T=tile,
            num_warps=TILE_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return x
