"""Significance sums of prompt tokens from the attention of the last queries.

Scores are computed twice instead of kept: once for every query's log-sum-exp, where attention has not
found it, once for the sums.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_scored
from diffkv.kernels.triton.constants import DTYPES, MIN_DOT, cdiv, power_of_2
from diffkv.kernels.triton.launch import launch

__all__ = ["significance"]

LOG2_E = math.log2(math.e)
_LOG2_E = tl.constexpr(LOG2_E)

ITEM_TOKENS = 128
"""Tokens that one program scores; fewer where float32 vectors are long."""

SUM_TOKENS = 32
"""At most, where sums are added up: of one segment alone, so that programs would be few."""

QUERY_ROWS = 64
"""Queries of one head that a program scores at a time, likewise."""

MERGE_ITEMS = 32

MIN_PADDED_REQUESTS = 64
"""Requests that kernels are compiled for, at least: each other number costs a compilation."""


@triton.jit
def _lengths(starts_ptr, R, R_PADDED: tl.constexpr):
    """[R_PADDED] tokens of each request."""
    r = tl.arange(0, R_PADDED)
    end = tl.load(starts_ptr + r + 1, mask=r < R, other=0)
    return end - tl.load(starts_ptr + r, mask=r < R, other=0)


@triton.jit
def _request_items(
    starts_ptr, own_ptr, R, R_PADDED: tl.constexpr, B: tl.constexpr, OWN: tl.constexpr
):
    """[R_PADDED] items of each request, and of it and all before; with OWN those that have sums."""
    lengths = _lengths(starts_ptr, R, R_PADDED)
    items = tl.cdiv(lengths, B)
    if OWN:
        own = _lengths(own_ptr, R, R_PADDED)
        items = tl.where(own > 0, items - (lengths - own) // B, 0)
    return items, tl.cumsum(items, 0)


@triton.jit
def _item(
    key_ptr,
    stride,
    starts_q_ptr,
    starts_k_ptr,
    own_ptr,
    max_queries,
    R,
    R_PADDED: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DOT: tl.constexpr,
    B: tl.constexpr,
    OWN: tl.constexpr,
):
    """Work of one program, for one head: tokens of one request, scored by its last queries.

    Returns (request, its first scored query, how many, its tokens, how many of them without a sum, this
    program's tokens, their keys); the request is R where there is no work. With OWN work is among tokens
    with a sum alone, else it is among all, and those without are 0.
    """
    pid = tl.program_id(0)
    items, through = _request_items(starts_k_ptr, own_ptr, R, R_PADDED, B, OWN)
    r = tl.sum((through <= pid).to(tl.int32))
    before = tl.sum(tl.where(tl.arange(0, R_PADDED) < r, items, 0))
    request = tl.minimum(r, R - 1)
    end_q = tl.load(starts_q_ptr + request + 1)
    first_q = tl.maximum(tl.load(starts_q_ptr + request), end_q - max_queries)
    first_k = tl.load(starts_k_ptr + request)
    n = tl.where(r < R, tl.load(starts_k_ptr + request + 1) - first_k, 0)
    without = 0
    if OWN:
        own = tl.load(own_ptr + request + 1) - tl.load(own_ptr + request)
        without = tl.where(r < R, n - own, 0)
    # Where a token is in its program does not depend on which sums are asked for
    token = (without // B + pid - before) * B + tl.arange(0, B)
    d = tl.arange(0, DP)
    at = (first_k + token).to(tl.int64) * stride + tl.program_id(1) * D
    mask = (token < tl.where(r < R, n, 0))[:, None] & (d < D)[None, :]
    keys = tl.load(key_ptr + at[:, None] + d[None, :], mask=mask, other=0.0).to(DOT)
    return r, first_q, end_q - first_q, n, without, token, keys


@triton.jit
def _scores(
    query_ptr, stride, q_head, first_q, num_q, j, keys, token, n, scale,
    D: tl.constexpr, DP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """[queries, tokens] to base 2; -inf where there is no query or it does not see the token."""
    d = tl.arange(0, DP)
    at = (first_q + j).to(tl.int64) * stride + q_head * D
    mask = (j < num_q)[:, None] & (d < D)[None, :]
    q = tl.load(query_ptr + at[:, None] + d[None, :], mask=mask, other=0.0).to(DOT)
    scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale
    seen = (token[None, :] <= (n - num_q + j)[:, None]) & (j < num_q)[:, None]
    return tl.where(seen & (token < n)[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=["R", "max_queries"])
def _lse_kernel(
    query_ptr,  # [., H * G, D]
    key_ptr,  # [N, H, D]
    starts_q_ptr,  # [R + 1]
    starts_k_ptr,  # [R + 1]
    most_ptr,  # [items, H * G, QUERIES] f32, out
    total_ptr,  # [items, H * G, QUERIES] f32, out
    query_stride,
    key_stride,
    scale,
    max_queries,
    R,
    R_PADDED: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DOT: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    B: tl.constexpr,
):
    """Largest score of every query among one item's tokens, and the sum of powers relative to it."""
    pid = tl.program_id(0)
    head = tl.program_id(1)
    r, first_q, num_q, n, _, token, keys = _item(
        key_ptr,
        key_stride,
        starts_q_ptr,
        starts_k_ptr,
        starts_k_ptr,
        max_queries,
        R,
        R_PADDED,
        D,
        DP,
        DOT,
        B,
        OWN=False,
    )
    if r < R:
        for g in range(G):
            for block in range(0, QUERIES, ROWS):
                j = block + tl.arange(0, ROWS)
                q_head = head * G + g
                scores = _scores(
                    query_ptr, query_stride, q_head, first_q, num_q, j, keys, token, n, scale,
                    D, DP, DOT,
                )  # fmt: skip
                most = tl.maximum(tl.max(scores, 1), -1.0e30)
                total = tl.sum(tl.exp2(scores - most[:, None]), 1)
                at = (pid * (H * G) + q_head).to(tl.int64) * QUERIES + j
                tl.store(most_ptr + at, most)
                tl.store(total_ptr + at, total)


@triton.jit(do_not_specialize=["R"])
def _merge_kernel(
    starts_k_ptr,  # [R + 1]
    most_ptr,  # [items, HEADS, QUERIES]
    total_ptr,  # [items, HEADS, QUERIES]
    lse_ptr,  # [R, HEADS, QUERIES] f32, out
    R,
    R_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    B: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """One program per request, query head and block of queries."""
    r = tl.program_id(0)
    q_head = tl.program_id(1)
    j = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    items, _ = _request_items(starts_k_ptr, starts_k_ptr, R, R_PADDED, B, False)
    each = tl.arange(0, R_PADDED)
    first = tl.sum(tl.where(each < r, items, 0))
    num = tl.sum(tl.where(each == r, items, 0))
    most = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, num, ITEMS):
        item = start + tl.arange(0, ITEMS)
        at = ((first + item).to(tl.int64) * HEADS + q_head)[:, None] * QUERIES + j[None, :]
        mask = (item < num)[:, None] & (j >= 0)[None, :]
        item_most = tl.load(most_ptr + at, mask=mask, other=-1.0e30)
        item_total = tl.load(total_ptr + at, mask=mask, other=0.0)
        new_most = tl.maximum(most, tl.max(item_most, 0))
        total = total * tl.exp2(most - new_most)
        total += tl.sum(item_total * tl.exp2(item_most - new_most[None, :]), 0)
        most = new_most
    lse = tl.where(total > 0.0, most + tl.log2(tl.maximum(total, 1.0e-30)), float("inf"))
    tl.store(lse_ptr + (r * HEADS + q_head).to(tl.int64) * QUERIES + j, lse)


@triton.jit(do_not_specialize=["R", "max_queries", "N", "lse_stride"])
def _sum_kernel(
    query_ptr,  # [., H * G, D]
    key_ptr,  # [N, H, D]
    starts_q_ptr,  # [R + 1]
    starts_k_ptr,  # [R + 1]
    own_ptr,  # [R + 1]
    lse_ptr,  # [R, H * G, QUERIES] to base 2; with GIVEN [H * G, .] of all queries, natural
    sums_ptr,  # [H, N] f32, out
    query_stride,
    key_stride,
    scale,
    max_queries,
    R,
    N,
    lse_stride,
    R_PADDED: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DOT: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    B: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Sums of one item's tokens: probabilities over the queries, the largest of the group."""
    head = tl.program_id(1)
    r, first_q, num_q, n, without, token, keys = _item(
        key_ptr,
        key_stride,
        starts_q_ptr,
        starts_k_ptr,
        own_ptr,
        max_queries,
        R,
        R_PADDED,
        D,
        DP,
        DOT,
        B,
        OWN=True,
    )
    if r < R:
        largest = tl.zeros([B], tl.float32)
        for g in range(G):
            total = tl.zeros([B], tl.float32)
            for block in range(0, QUERIES, ROWS):
                j = block + tl.arange(0, ROWS)
                q_head = head * G + g
                scores = _scores(
                    query_ptr, query_stride, q_head, first_q, num_q, j, keys, token, n, scale,
                    D, DP, DOT,
                )  # fmt: skip
                if GIVEN:
                    at = q_head.to(tl.int64) * lse_stride + first_q + j
                    lse = tl.load(lse_ptr + at, mask=j < num_q, other=float("inf")) * _LOG2_E
                else:
                    lse = tl.load(lse_ptr + (r * (H * G) + q_head).to(tl.int64) * QUERIES + j)
                total += tl.sum(tl.exp2(scores - lse[:, None]), 0)
            largest = tl.maximum(largest, total)
        at = head.to(tl.int64) * N + tl.load(own_ptr + r) + token - without
        tl.store(sums_ptr + at, largest, mask=(token >= without) & (token < n))


def tile(padded_dim: int, element_bytes: int) -> tuple[int, int]:
    """Tokens and queries of one product: products of float32 keep parts of both in shared memory."""
    smaller = max(1, padded_dim * element_bytes // 256) if element_bytes == 4 else 1
    return max(MIN_DOT, ITEM_TOKENS // smaller), max(MIN_DOT, QUERY_ROWS // smaller)


def _log_sum_exps(
    inputs: tuple[Tensor, ...], numbers: tuple[Any, ...], num_items: int, constants: dict[str, Any]
) -> Tensor:
    """[R, num_q_heads, QUERIES] of all scores, to base 2: two launches. Arguments as `_lse_kernel`'s."""
    query, starts_k, num_requests = inputs[0], inputs[3], numbers[-1]
    num_q_heads, padded = query.shape[1], constants["QUERIES"]
    shape = (num_items, num_q_heads, padded)
    most, total = torch.empty(2, *shape, dtype=torch.float32, device=query.device).unbind()
    found = torch.empty(num_requests, *shape[1:], dtype=torch.float32, device=query.device)
    launch(
        _lse_kernel, (num_items, constants["H"]),
        *inputs, most, total, *numbers, **constants, num_warps=8,
    )  # fmt: skip
    merged = {name: constants[name] for name in ("R_PADDED", "QUERIES", "ROWS", "B")}
    launch(
        _merge_kernel, (num_requests, num_q_heads, padded // constants["ROWS"]),
        starts_k, most, total, found, num_requests, HEADS=num_q_heads, ITEMS=MERGE_ITEMS, **merged,
        num_warps=4,
    )  # fmt: skip
    return found


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
    num_tokens, num_kv_heads, head_dim = key.shape
    num_queries, num_q_heads, _ = query.shape
    device, num_requests = key.device, cu_seqlens_k.numel() - 1
    starts = cu_seqlens_q, cu_seqlens_k, cu_seqlens_own
    *strides, lse_stride = check_scored(query, key, *starts, num_own, lse, device)
    sums = torch.empty(num_kv_heads, num_own, dtype=torch.float32, device=device)
    if not num_own or not num_requests:
        return sums.zero_()
    if not num_queries or max_queries <= 0:
        return sums.zero_()

    max_queries = min(max_queries, num_queries)
    padded_dim = max(MIN_DOT, power_of_2(head_dim))
    tokens, rows = tile(padded_dim, key.element_size())
    padded_queries = cdiv(max_queries, rows) * rows
    # Lengths stay on the device: at most one item per request is not full
    num_items = cdiv(num_tokens, tokens) + num_requests
    dtype = DTYPES[key.dtype]
    padded_requests = max(MIN_PADDED_REQUESTS, power_of_2(num_requests))
    constants = {
        "R_PADDED": padded_requests, "B": tokens, "QUERIES": padded_queries, "ROWS": rows,
        "H": num_kv_heads, "G": num_q_heads // num_kv_heads, "D": head_dim,
        "DP": padded_dim,
        # The interpreter has no products of bfloat16
        "DOT": tl.float32 if dtype is tl.bfloat16 and device.type != "cuda" else dtype,
    }  # fmt: skip
    inputs = (query, key, cu_seqlens_q, cu_seqlens_k)
    numbers = (*strides, scale * LOG2_E, max_queries, num_requests)
    found = _log_sum_exps(inputs, numbers, num_items, constants) if lse is None else lse
    tokens = min(tokens, SUM_TOKENS)
    added = (*inputs, cu_seqlens_own, found, sums)
    launch(
        _sum_kernel, (cdiv(num_own, tokens) + 2 * num_requests, num_kv_heads),
        *added, *numbers, num_own, lse_stride, GIVEN=lse is not None,
        **constants | {"B": tokens}, num_warps=4,
    )  # fmt: skip
    return sums
