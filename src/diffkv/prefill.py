"""Exact attention of prompts, before anything of them is compressed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffkv.uploads import Place

__all__ = ["Prefill", "Spans", "torch_prefill"]


@dataclass(frozen=True)
class Spans:
    """Lengths and starts of R requests that are packed, one after the other.

    Attributes:
        num_queries: each request's queries, its last tokens.
        num_keys: each request's keys, all of its tokens so far.
        query_starts: [R + 1] int32, where each request's queries start.
        key_starts: [R + 1] int32.
    """

    num_queries: tuple[int, ...]
    num_keys: tuple[int, ...]
    query_starts: Tensor
    key_starts: Tensor

    @classmethod
    def of(cls, num_queries: Sequence[int], num_keys: Sequence[int], place: Place) -> "Spans":
        """Put together the spans of requests of given lengths."""
        starts = ([0, *accumulate(lengths)] for lengths in (num_queries, num_keys))
        return cls(tuple(num_queries), tuple(num_keys), *map(place, starts))


class Prefill(Protocol):
    """Causal attention of the last tokens of each of several requests over all of its tokens."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, output: Tensor
    ) -> Tensor | None:
        """Attend.

        Args:
            query: [num_queries of all, num_q_heads, head_dim]; rows may be apart.
            key: [num_keys of all, num_kv_heads, head_dim], likewise.
            value: likewise.
            spans: the requests, each with at least as many keys as queries.
            scale: softmax scale.
            output: [num_queries of all, num_q_heads, head_dim], written; rows may be apart.

        Returns:
            [num_q_heads, num_queries of all] float32, the logarithm of the sum of exponentials of each
            query's scores, scale included; None where the kernel does not say.
        """
        ...


def torch_prefill(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, output: Tensor
) -> None:
    """`Prefill` by torch's scaled_dot_product_attention, one request after the other."""
    queries, outputs = query.split(spans.num_queries), output.split(spans.num_queries)
    keys, values = key.split(spans.num_keys), value.split(spans.num_keys)
    for q, k, v, out in zip(queries, keys, values, outputs, strict=True):
        n, total = len(q), len(k)
        seen = None
        if total > n:
            seen = torch.ones(n, total, dtype=torch.bool, device=q.device).tril(total - n)
        attended = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=seen,
            is_causal=seen is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out.copy_(attended[0].transpose(0, 1))
