"""Significance sums of prompt tokens from the attention of the last queries."""

import torch
from torch import Tensor

from diffkv.kernels.cpu.check import check_packed, check_tensor
from diffkv.kernels.cpu.library import DTYPES, vectors_library

__all__ = ["significance"]


def significance(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    max_queries: int,
) -> Tensor:
    """Same contract as `reference.significance`. Rows of `query` and `key` may be apart."""
    num_tokens, num_kv_heads, head_dim = key.shape
    num_queries, num_q_heads, _ = query.shape
    if key.dtype not in DTYPES:
        raise ValueError(f"key must be one of {', '.join(map(str, DTYPES))}, got {key.dtype}")
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"query must have a multiple of {num_kv_heads} heads, as key has, got {num_q_heads}"
        )
    num_requests = cu_seqlens_k.numel() - 1
    query_stride = check_packed("query", query, key.dtype, num_queries, num_q_heads, head_dim)
    key_stride = check_packed("key", key, key.dtype, num_tokens, num_kv_heads, head_dim)
    check_tensor("cu_seqlens_q", cu_seqlens_q, torch.int32, num_requests + 1)
    check_tensor("cu_seqlens_k", cu_seqlens_k, torch.int32, num_requests + 1)
    sums = torch.empty(num_kv_heads, num_tokens, dtype=torch.float32)
    vectors_library().significance(
        query.data_ptr(), query_stride, key.data_ptr(), key_stride,
        cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(), num_requests,
        num_tokens, num_kv_heads, num_q_heads // num_kv_heads, head_dim, DTYPES[key.dtype],
        scale, max_queries, sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sums
