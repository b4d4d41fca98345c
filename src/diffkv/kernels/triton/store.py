"""Store prompt tokens into pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_index, check_tokens
from diffkv.kernels.triton.codes import (
    position_pointers,
    sum_pointers,
    write_side,
)
from diffkv.kernels.triton.constants import TILE_WARPS, cdiv, tile_vectors
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.order import launch_dependents, wait
from diffkv.kernels.triton.ring import is_last, scan
from diffkv.kernels.triton.table import centre_of, enter_page, num_leaves, page_where, table_of
from diffkv.kernels.triton.workspace import workspace
from diffkv.policy import DROPPED
from diffkv.state import PoolState, PromptTokens

__all__ = ["store_prompt"]

COUNT_BLOCK = 1024
"""Tokens that a program counts at a time."""

SCAN_BLOCK = 1024
PAGE_BLOCK = 128

_DROPPED = tl.constexpr(DROPPED)


@triton.jit(do_not_specialize=["layer", "N"])
def _count_kernel(
    slots_ptr,  # [R]
    starts_ptr,  # [R + 1]
    tiers_ptr,  # [H, N] i8
    num_tokens_ptr,  # [S, L, H, 2]
    held_ptr,  # [S, L, H, 2]
    token_ptr,  # [H, N] i32, out: of each request, high tokens first, low ones last, -1 between
    number_ptr,  # [H, N] i32, out: number of each of these in its head and tier
    request_ptr,  # [N] i32, out
    after_ptr,  # [R, H, 2] i32, out: tokens that each head will keep
    wanted_ptr,  # [2, R, H, 2] i32, out: pages and leaves that this takes
    first_ptr,  # [2, R, H, 2] i64, out: where their entries begin in the rings
    ring_ends_ptr,  # [2] i64
    leaf_ends_ptr,  # [2] i64
    overruns_ptr,  # [1] i32
    ticket_ptr,  # [1] i32
    layer,
    N,
    L: tl.constexpr,
    H: tl.constexpr,
    TABLE: tl.constexpr,
    TIERS: tl.constexpr,
    B: tl.constexpr,
    SCAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per request and head. Tokens of a tier are put together, to be quantised together.

    The last one takes what all of them want.
    """
    wait(PDL)
    launch_dependents(PDL)
    r = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(slots_ptr + r).to(tl.int64)
    start = tl.load(starts_ptr + r)
    end = tl.load(starts_ptr + r + 1)
    row = (slot * L + layer) * H + head
    is_request = slot >= 0
    last = tl.where(is_request, end, start)
    tiers_ptr += head.to(tl.int64) * N
    token_ptr += head.to(tl.int64) * N
    number_ptr += head.to(tl.int64) * N
    high = tl.load(num_tokens_ptr + row * 2, mask=is_request, other=0)
    low = tl.load(num_tokens_ptr + row * 2 + 1, mask=is_request, other=0)
    first_high = start
    last_low = end
    for block in range(start, end, B):
        i = block + tl.arange(0, B)
        mask = i < end
        tier = tl.load(tiers_ptr + i, mask=i < last, other=_DROPPED)
        is_high = (tier == 0).to(tl.int32)
        is_low = (tier == 1).to(tl.int32)
        before_high = tl.cumsum(is_high, 0) - is_high
        before_low = tl.cumsum(is_low, 0) - is_low
        place = tl.where(tier == 0, first_high + before_high, last_low - 1 - before_low)
        number = tl.where(tier == 0, high + before_high, low + before_low)
        kept = mask & (tier < 2)
        tl.store(token_ptr + place, i, mask=kept)
        tl.store(number_ptr + place, number, mask=kept)
        if head == 0:
            tl.store(request_ptr + i, tl.zeros_like(i) + r, mask=mask)
        num_high = tl.sum(is_high)
        num_low = tl.sum(is_low)
        high += num_high
        low += num_low
        first_high += num_high
        last_low -= num_low
    for block in range(first_high, last_low, B):
        place = block + tl.arange(0, B)
        tl.store(token_ptr + place, -1, mask=place < last_low)
    out = (r * H + head) * 2
    tl.store(after_ptr + out, high)
    tl.store(after_ptr + out + 1, low)
    leaf_out = tl.num_programs(0) * (H * 2) + out
    held = tl.load(held_ptr + row * 2, mask=is_request, other=0)
    pages = tl.where(is_request, tl.cdiv(high, TIERS[0].tokens), 0)
    tl.store(wanted_ptr + out, pages - held)
    tl.store(wanted_ptr + leaf_out, num_leaves(pages, TABLE) - num_leaves(held, TABLE))
    held = 0
    pages = 0
    if len(TIERS) > 1:
        held = tl.load(held_ptr + row * 2 + 1, mask=is_request, other=0)
        pages = tl.where(is_request, tl.cdiv(low, TIERS[1].tokens), 0)
    tl.store(wanted_ptr + out + 1, pages - held)
    tl.store(wanted_ptr + leaf_out + 1, num_leaves(pages, TABLE) - num_leaves(held, TABLE))
    if is_last(ticket_ptr, tl.num_programs(0) * H):
        num = tl.num_programs(0) * (H * 2)
        scan(wanted_ptr, first_ptr, ring_ends_ptr, leaf_ends_ptr, overruns_ptr, num, True, SCAN)


@triton.jit(do_not_specialize=["layer"])
def _enter_kernel(
    slots_ptr,  # [R]
    first_ptr,  # [2, R, H, 2] i64
    after_ptr,  # [R, H, 2]
    wanted_ptr,  # [2, R, H, 2]
    free_ring_ptr,  # [num_pages]
    leaves_ptr,  # [num_leaves, E]
    free_leaves_ptr,  # [num_leaves]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    held_ptr,  # [S, L, H, 2]
    layer,
    num_pages,
    leaf_ring,
    L: tl.constexpr,
    H: tl.constexpr,
    TABLE: tl.constexpr,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """Enter the pages that were taken into the tables. One program per request, head and tier."""
    wait(PDL)
    launch_dependents(PDL)
    pid = tl.program_id(0)
    slot = tl.load(slots_ptr + pid // (2 * H)).to(tl.int64)
    first = tl.load(first_ptr + pid)
    if (slot >= 0) & (first >= 0):
        tier = pid % 2
        row = (slot * L + layer) * H + pid // 2 % H
        wanted = tl.load(wanted_ptr + pid)
        held = tl.load(held_ptr + row * 2 + tier)
        first_leaf = tl.load(first_ptr + tl.num_programs(0) + pid) - num_leaves(held, TABLE)
        table = table_of(leaves_ptr, directory_ptr, row, TABLE)
        for start in range(0, wanted, B):
            k = start + tl.arange(0, B)
            mask = k < wanted
            page = tl.load(free_ring_ptr + (first + k) % num_pages, mask=mask, other=0)
            number = held + k
            leaf = number // TABLE.entries
            opens = mask & (leaf >= num_leaves(held, TABLE))
            leaf_index = (first_leaf + leaf) % leaf_ring
            new_leaf = tl.load(free_leaves_ptr + leaf_index, mask=opens, other=0)
            if tier == 0:
                enter_page(table, number, page, mask, new_leaf, opens, 0, TABLE)
            else:
                enter_page(table, number, page, mask, new_leaf, opens, 1, TABLE)
        tl.store(held_ptr + row * 2 + tier, held + wanted)
        tl.store(num_tokens_ptr + row * 2 + tier, tl.load(after_ptr + pid))


@triton.jit
def _write_tier(
    key_ptr, value_ptr, centre_ptr, score, position, number, table, pages_ptr, mask,
    TIER: tl.constexpr, TIERS: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """Write tokens [T] of one head as tokens `number` of a tier."""
    T: tl.constexpr = TIERS[TIER]
    K: tl.constexpr = T.k
    V: tl.constexpr = T.v
    page = page_where(table, number // T.tokens, mask, TIER, TABLE).to(tl.int64)
    page_ptr = pages_ptr + page * PAGE
    index = number % T.tokens
    DTYPE: tl.constexpr = key_ptr.dtype.element_ty
    write_side(key_ptr, centre_ptr, page_ptr, index, mask, K, DTYPE, CENTRED)
    write_side(value_ptr, centre_ptr, page_ptr, index, mask, V, DTYPE, False)
    if T.tracked:
        tl.store(sum_pointers(page_ptr, index, T), score, mask=mask)
        tl.store(position_pointers(page_ptr, index, T), position, mask=mask)


@triton.jit(do_not_specialize=["layer", "N"])
def _write_kernel(
    slots_ptr,  # [R]
    centres_ptr,  # [S, L, H, D or 0] bf16
    first_ptr,  # [2, R, H, 2] i64
    token_ptr,  # [H, N]
    number_ptr,  # [H, N]
    request_ptr,  # [N]
    key_ptr,  # [N, H, D]
    value_ptr,  # [N, H, D]
    positions_ptr,  # [N]
    tiers_ptr,  # [H, N] i8
    sums_ptr,  # [H, N] f32
    pages_ptr,  # [num_pages, PAGE]
    leaves_ptr,  # [num_leaves, E]
    directory_ptr,  # [S, L, H, W]
    key_stride,
    value_stride,
    layer,
    N,
    L: tl.constexpr,
    H: tl.constexpr,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    TIERS: tl.constexpr,
    CENTRED: tl.constexpr,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """Quantise and write. One program per B tokens of a head, in order of tiers."""
    wait(PDL)
    launch_dependents(PDL)
    NUM_TIERS: tl.constexpr = len(TIERS)
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    head = tl.program_id(1).to(tl.int64)
    exists = place < N
    i = tl.load(token_ptr + head * N + place, mask=exists, other=-1).to(tl.int64)
    r = tl.load(request_ptr + place, mask=exists, other=0).to(tl.int64)
    kept = (i >= 0) & (tl.load(first_ptr + r * (2 * H), mask=exists, other=-1) >= 0)
    number = tl.load(number_ptr + head * N + place, mask=kept, other=0)
    tier_of = tl.load(tiers_ptr + head * N + i, mask=kept, other=_DROPPED)
    slot = tl.load(slots_ptr + r, mask=kept, other=0).to(tl.int64)
    row = (slot * L + layer) * H + head
    table = table_of(leaves_ptr, directory_ptr, row, TABLE)
    centre_at = centre_of(centres_ptr, row, TIERS[0].k)
    score = tl.load(sums_ptr + head * N + i, mask=kept, other=0.0)
    position = tl.load(positions_ptr + i, mask=kept, other=0)
    for t in tl.static_range(NUM_TIERS):
        mask = kept & (tier_of == t)
        if tl.max(mask.to(tl.int32), 0) > 0:
            key_at = key_ptr + i * key_stride + head * D
            value_at = value_ptr + i * value_stride + head * D
            _write_tier(
                key_at,
                value_at,
                centre_at,
                score,
                position,
                number,
                table,
                pages_ptr,
                mask,
                t,
                TIERS,
                TABLE,
                PAGE,
                CENTRED,
            )


def store_prompt(
    state: PoolState, layer: int, tokens: PromptTokens, tiers: Tensor, sums: Tensor
) -> None:
    """Same contract as `reference.store_prompt`. Rows of key and value may be apart.

    The rings' order is (request, head, tier); lengths stay on the device.
    """
    work = workspace(state)
    num, heads, num_requests = tokens.key.shape[0], state.num_kv_heads, tokens.slots.numel()
    head_dim = state.layout.head_dim
    check_index("layer", layer, state.num_layers)
    key_stride, value_stride = check_tokens(state, tokens, tiers, sums, work.device)
    if not num or not num_requests:
        return
    token = work.buffer("store_token", torch.int32, heads, num)
    number = work.buffer("store_number", torch.int32, heads, num)
    request = work.buffer("store_request", torch.int32, num)
    after = work.buffer("store_after", torch.int32, num_requests, heads, 2)
    wanted = work.buffer("store_wanted", torch.int32, 2, num_requests, heads, 2)
    first = work.buffer("store_first", torch.int64, 2, num_requests, heads, 2)
    tables = {"L": state.num_layers, "H": heads, "TABLE": work.table, **work.overlap}
    launch(
        _count_kernel, (num_requests, heads),
        tokens.slots, tokens.cu_seqlens, tiers, state.num_tokens, state.num_pages_held,
        token, number, request, after, wanted, first, state.ring_ends, state.leaf_ends,
        state.overruns, work.ticket, layer, num,
        TIERS=work.tiers, B=COUNT_BLOCK, SCAN=SCAN_BLOCK, num_warps=8, **tables,
    )  # fmt: skip
    launch(
        _enter_kernel, (num_requests * heads * 2,),
        tokens.slots, first, after, wanted, state.free_ring, state.leaves, state.free_leaves,
        state.directory, state.num_tokens, state.num_pages_held, layer, state.num_pages,
        state.free_leaves.numel(), B=PAGE_BLOCK, num_warps=1, **tables,
    )  # fmt: skip
    block = tile_vectors(head_dim)
    launch(
        _write_kernel, (cdiv(num, block), heads),
        tokens.slots, state.centres, first, token, number, request, tokens.key, tokens.value,
        tokens.positions, tiers, sums, state.pages, state.leaves, state.directory, key_stride,
        value_stride, layer, num,
        D=head_dim, PAGE=state.layout.page_bytes, TIERS=work.tiers, CENTRED=state.centre_dim > 0,
        B=block, num_warps=TILE_WARPS, enable_fp_fusion=False, **tables,
    )  # fmt: skip
