"""Significance sums of prompt tokens from the attention of the last queries."""

import torch
from torch import Tensor

from diffkv.kernels.check import check_scored
from diffkv.kernels.cpu.library import CPU, DTYPES, vectors_library

__all__ = ["significance"]


def significance(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    cu_seqlens_own: Tensor,
    num_own: int,
    scale: float,
    max_queries: int,
    lse: Tensor | None = None,
) -> Tensor:
    """Same contract as `reference.significance`. Rows of `query` and `key` may be apart."""
    _, num_kv_heads, head_dim = key.shape
    num_requests = cu_seqlens_k.numel() - 1
    starts = cu_seqlens_q, cu_seqlens_k, cu_seqlens_own
    *strides, lse_stride = check_scored(query, key, *starts, num_own, lse, CPU)
    query_bytes, key_bytes = (stride * key.element_size() for stride in strides)
    sums = torch.empty(num_kv_heads, num_own, dtype=torch.float32)
    vectors_library().significance(
        query.data_ptr(), query_bytes, key.data_ptr(), key_bytes,
        *(each.data_ptr() for each in starts), num_requests,
        num_own, num_kv_heads, query.shape[1] // num_kv_heads, head_dim, DTYPES[key.dtype],
        scale, max_queries, None if lse is None else lse.data_ptr(), lse_stride,
        sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sums
