"""What complete rows of prompts are stored with: tiers of their tokens, and a centre of their keys."""

import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_centring, check_decided, check_index
from diffkv.kernels.triton.codes import rounded
from diffkv.kernels.triton.constants import cdiv
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.order import launch_dependents, overlap, wait
from diffkv.kernels.triton.table import centre_of
from diffkv.kernels.triton.workspace import workspace
from diffkv.policy import DROPPED, HIGH, LOW, SCORED_QUERIES
from diffkv.state import PoolState

__all__ = ["centre_rows", "decide_rows"]

DECIDE_BLOCK = 1024
"""Tokens of a row that stay in registers while its last high page is filled; others are read again."""

CENTRE_TOKENS, CENTRE_CHANNELS = 1024, 16
"""Of one step of a sum, and of one program."""

_HIGH, _LOW, _DROPPED = tl.constexpr(HIGH), tl.constexpr(LOW), tl.constexpr(DROPPED)
_RULE = tl.constexpr(SCORED_QUERIES)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_ABOVE_ALL = tl.constexpr(0x7F800001)
"""Above the bits of infinity."""
_ROUNDS = tl.constexpr(31)


@triton.jit
def _tokens(
    sums_ptr, tiers_ptr, i, end, least_high, least_low, window, scored,
    BOUNDS: tl.constexpr,
):  # fmt: skip
    """(mean, tier, rank) of some tokens of a row; ranks of low ones are ordered as means, others -1."""
    mask = i < end
    from_end = end - i
    total = tl.load(sums_ptr + i, mask=mask, other=0.0)
    mean = tl.div_rn(total, tl.maximum(tl.minimum(from_end, scored), 1).to(tl.float32))
    if BOUNDS:
        tier = tl.where(mean >= least_low, _LOW, _DROPPED)
        tier = tl.where((mean >= least_high) | (from_end <= window), _HIGH, tier)
    else:
        tier = tl.load(tiers_ptr + i, mask=mask, other=_DROPPED).to(tl.int32)
    tier = tl.where(mask, tier, _DROPPED)
    bits = mean.to(tl.int32, bitcast=True) & _MAGNITUDE
    return mean, tier, tl.where((tier == _LOW) & (mean >= 0.0), bits, -1)


@triton.jit
def _write(sums_ptr, tiers_ptr, i, end, tokens, least, left, seen, scored):
    """Write tokens, high where they are above the least rank or among the first `left` that have it."""
    mean, tier, rank = tokens
    equal = (rank == least).to(tl.int32)
    before = seen + tl.cumsum(equal, 0) - equal
    moves = (rank > least) | ((rank == least) & (before < left))
    tl.store(tiers_ptr + i, tl.where(moves, _HIGH, tier).to(tl.int8), mask=i < end)
    if scored != _RULE:
        queries = tl.minimum(end - i, _RULE).to(tl.float32)
        tl.store(sums_ptr + i, mean * queries, mask=i < end)
    return seen + tl.sum(equal)


@triton.jit(do_not_specialize=["N", "window", "scored"])
def _decide_kernel(
    sums_ptr,  # [H, N] f32
    starts_ptr,  # [R + 1]
    bounds_ptr,  # [R, 2] f32
    page_tokens_ptr,  # [R]
    tiers_ptr,  # [H, N] i8
    N,
    window,
    scored,
    BOUNDS: tl.constexpr,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row and head. The least rank that moves is found bit by bit."""
    wait(PDL)
    launch_dependents(PDL)
    r = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    start = tl.load(starts_ptr + r)
    end = tl.load(starts_ptr + r + 1)
    page_tokens = tl.load(page_tokens_ptr + r)
    sums_ptr += head * N
    tiers_ptr += head * N
    least_high = 0.0
    least_low = 0.0
    if BOUNDS:
        least_high = tl.load(bounds_ptr + 2 * r)
        least_low = tl.load(bounds_ptr + 2 * r + 1)
    i = start + tl.arange(0, B)
    tokens = _tokens(sums_ptr, tiers_ptr, i, end, least_high, least_low, window, scored, BOUNDS)
    least = _ABOVE_ALL
    left = 0
    if page_tokens > 0:
        num_high = tl.sum((tokens[1] == _HIGH).to(tl.int32))
        num_low = tl.sum((tokens[2] >= 0).to(tl.int32))
        for block in range(start + B, end, B):
            more = _tokens(
                sums_ptr, tiers_ptr, block + tl.arange(0, B), end, least_high, least_low, window,
                scored, BOUNDS,
            )  # fmt: skip
            num_high += tl.sum((more[1] == _HIGH).to(tl.int32))
            num_low += tl.sum((more[2] >= 0).to(tl.int32))
        room = (page_tokens - num_high % page_tokens) % page_tokens
        if room >= num_low:
            least = -1
        elif room > 0:
            # Ranks from `least` on are as many as there is room for or more, those from `above` on fewer
            least = 0
            above = _ABOVE_ALL
            num_above = 0
            for _ in range(_ROUNDS):
                middle = least + (above - least) // 2
                num = tl.sum((tokens[2] >= middle).to(tl.int32))
                for block in range(start + B, end, B):
                    more = _tokens(
                        sums_ptr, tiers_ptr, block + tl.arange(0, B), end, least_high, least_low,
                        window, scored, BOUNDS,
                    )  # fmt: skip
                    num += tl.sum((more[2] >= middle).to(tl.int32))
                fits = num < room
                above = tl.where(fits, middle, above)
                num_above = tl.where(fits, num, num_above)
                least = tl.where(fits, least, middle)
            left = room - num_above
    seen = _write(sums_ptr, tiers_ptr, i, end, tokens, least, left, 0, scored)
    for block in range(start + B, end, B):
        i = block + tl.arange(0, B)
        tokens = _tokens(sums_ptr, tiers_ptr, i, end, least_high, least_low, window, scored, BOUNDS)
        seen = _write(sums_ptr, tiers_ptr, i, end, tokens, least, left, seen, scored)


@triton.jit(do_not_specialize=["layer"])
def _centre_kernel(
    rows_ptr,  # [R, 4]: slot, skipped tokens, row before, heir
    starts_ptr,  # [R + 1]
    key_ptr,  # [N, H, D]
    centres_ptr,  # [S, L, H, D] bf16
    key_stride,
    layer,
    K: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row, head and C channels: T sums, then their sum."""
    wait(PDL)
    launch_dependents(PDL)
    r = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.program_id(2) * C + tl.arange(0, C)
    slot = tl.load(rows_ptr + 4 * r)
    skipped = tl.load(rows_ptr + 4 * r + 1)
    before = tl.load(rows_ptr + 4 * r + 2)
    heir = tl.load(rows_ptr + 4 * r + 3)
    at = centre_of(centres_ptr, (before * L + layer) * H + head, K) + d
    centre = tl.load(at, mask=d < tl.where(before >= 0, D, 0), other=0.0)
    if before < 0:
        first = tl.load(starts_ptr + r) + skipped
        end = tl.load(starts_ptr + r + 1)
        key_ptr += head * D
        total = tl.zeros([T, C], tl.float32)
        for start in range(first, end, T):
            token = start + tl.arange(0, T)
            token_at = key_ptr + token.to(tl.int64) * key_stride
            mask = (token < end)[:, None] & (d < D)[None, :]
            total += tl.load(token_at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        count = tl.maximum(end - first, 1).to(tl.float32)
        centre = rounded(tl.div_rn(tl.sum(total, 0), count), tl.bfloat16)
    at = centre_of(centres_ptr, (slot * L + layer) * H + head, K) + d
    tl.store(at, centre, mask=d < D)
    at = centre_of(centres_ptr, (heir * L + layer) * H + head, K) + d
    tl.store(at, centre, mask=d < tl.where(heir >= 0, D, 0))


def decide_rows(
    sums: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor | None,
    page_tokens: Tensor,
    window: int,
    scored_queries: int,
    tiers: Tensor,
) -> None:
    """Same contract as `reference.decide_rows`. One launch."""
    check_decided(sums, cu_seqlens, bounds, page_tokens, tiers, sums.device)
    (heads, num), num_rows = sums.shape, page_tokens.numel()
    if not num or not num_rows:
        return
    launch(
        _decide_kernel, (num_rows, heads),
        sums, cu_seqlens, sums if bounds is None else bounds, page_tokens, tiers, num, window,
        scored_queries, BOUNDS=bounds is not None, B=DECIDE_BLOCK, num_warps=8,
        **overlap(sums.device),
    )  # fmt: skip


def centre_rows(
    state: PoolState, layer: int, rows: Tensor, cu_seqlens: Tensor, key: Tensor
) -> None:
    """Same contract as `reference.centre_rows`. One launch; rows of the keys may be apart."""
    work = workspace(state)
    check_index("layer", layer, state.num_layers)
    key_stride = check_centring(state, rows, cu_seqlens, key, work.device)
    heads, head_dim = state.num_kv_heads, state.layout.head_dim
    if not rows.shape[0]:
        return
    launch(
        _centre_kernel, (rows.shape[0], heads, cdiv(head_dim, CENTRE_CHANNELS)),
        rows, cu_seqlens, key, state.centres, key_stride, layer, K=work.tiers[0].k,
        L=state.num_layers, H=heads, D=head_dim, T=CENTRE_TOKENS, C=CENTRE_CHANNELS, num_warps=8,
        **work.overlap,
    )  # fmt: skip
