"""Significance sums of prompt tokens from the attention of the last queries."""

import torch
from torch import Tensor

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
    """Attention that the last queries of each request give to each of its last tokens.

    sum(i) = max over the group's query heads of the sum over the last queries q >= i of P(q, i), with
    P the causal softmax in float32, over all tokens of the request. The queries of a request are those
    of its last tokens. Which sums are asked for does not change them.

    Args:
        query: [num_query_tokens, num_q_heads, head_dim] of R requests, packed. Not modified.
        key: [num_tokens, num_kv_heads, head_dim], packed likewise: all tokens of each request.
        cu_seqlens_q: [R + 1] int32, where each request's queries start.
        cu_seqlens_k: [R + 1] int32, where each request's tokens start.
        cu_seqlens_own: [R + 1] int32, where those tokens of each start whose sums are asked for, packed
            likewise: its last ones.
        num_own: how many these are, the last of `cu_seqlens_own`.
        scale: softmax scale.
        max_queries: only the last so many queries of each request count.
        lse: [num_q_heads, num_query_tokens] float32, the logarithm of the sum of exponentials of each
            query's scores, scale included, where attention has found it; rows may be apart. None: it is
            computed here.

    Returns:
        [num_kv_heads, num_own] float32 sums; divide by min(N - i, queries) for means.
    """
    num_kv_heads = key.shape[1]
    group = query.shape[1] // num_kv_heads
    sums = torch.zeros(num_kv_heads, num_own, device=key.device)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    starts_own = cu_seqlens_own.tolist()
    for r in range(len(starts_k) - 1):
        first_q = max(starts_q[r], starts_q[r + 1] - max_queries)
        q = query[first_q : starts_q[r + 1]].float().transpose(0, 1)  # [num_q_heads, Q, D]
        tokens = slice(starts_k[r], starts_k[r + 1])
        k = key[tokens].float().transpose(0, 1).repeat_interleave(group, 0)  # [num_q_heads, N, D]
        num_queries, n = q.shape[1], k.shape[1]
        scores = (q @ k.transpose(1, 2)) * scale
        seen = torch.ones(num_queries, n, dtype=torch.bool, device=key.device).tril(n - num_queries)
        scores = scores.masked_fill(~seen, float("-inf"))
        if lse is None:
            probs = scores.softmax(-1)
        else:
            probs = (scores - lse[:, first_q : starts_q[r + 1], None]).exp()
        own = slice(starts_own[r], starts_own[r + 1])
        last = probs[:, :, n - (own.stop - own.start) :]
        sums[:, own] = last.sum(1).view(num_kv_heads, group, -1).amax(1)
    return sums
