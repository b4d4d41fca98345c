"""Exact attention of prompts, before anything of them is compressed."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["Prefill", "torch_prefill"]


class Prefill(Protocol):
    """Causal attention of the last tokens of each of several requests over all of its tokens."""

    def __call__(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        scale: float,
        outputs: Sequence[Tensor],
    ) -> None:
        """Attend.

        Args:
            queries: by request, [n, num_q_heads, head_dim], of the last n tokens.
            keys: by request, [N, num_kv_heads, head_dim], N >= n.
            values: likewise.
            scale: of the dot products.
            outputs: by request, [n, num_q_heads, head_dim], written.
        """
        ...


def torch_prefill(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    outputs: Sequence[Tensor],
) -> None:
    """`Prefill` by torch's scaled_dot_product_attention, one request after the other."""
    for query, key, value, output in zip(queries, keys, values, outputs, strict=True):
        n, total = query.shape[0], key.shape[0]
        seen = None
        if total > n:
            seen = torch.ones(n, total, dtype=torch.bool, device=query.device).tril(total - n)
        out = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=seen,
            is_causal=seen is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output.copy_(out[0].transpose(0, 1))
