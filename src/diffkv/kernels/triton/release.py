"""Give the pages of requests back to the ring, and the leaves that named them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_index, check_tensor
from diffkv.kernels.triton.constants import power_of_2
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.order import launch_dependents, wait
from diffkv.kernels.triton.ring import is_last, scan
from diffkv.kernels.triton.table import leaf_column, num_leaves, page_where, table_of
from diffkv.kernels.triton.workspace import workspace
from diffkv.state import PoolState

__all__ = ["release"]

SCAN_BLOCK = 1024
PAGE_BLOCK = 128
"""Pages that a program moves at a time."""


@triton.jit(do_not_specialize=["first_layer", "num_layers"])
def _count_kernel(
    slots_ptr,  # [R]
    held_ptr,  # [S, L, H, 2]
    totals_ptr,  # [2, R, num_layers] i32, out: pages, leaves
    before_ptr,  # [2, R, num_layers, H, 2] i32, out: those of the same layer that come before
    first_ptr,  # [2, R, num_layers] i64, out: where their entries begin in the rings
    ring_ends_ptr,  # [2] i64
    leaf_ends_ptr,  # [2] i64
    overruns_ptr,  # [1] i32
    ticket_ptr,  # [1] i32
    first_layer,
    num_layers,
    L: tl.constexpr,
    H2: tl.constexpr,
    H2_PADDED: tl.constexpr,
    TABLE: tl.constexpr,
    SCAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per request and layer. The last one makes room for what all give back."""
    wait(PDL)
    launch_dependents(PDL)
    pid = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + pid // num_layers).to(tl.int64)
    layer = first_layer + pid % num_layers
    each = tl.arange(0, H2_PADDED)
    mask = each < tl.where(slot >= 0, H2, 0)
    held = tl.load(held_ptr + (slot * L + layer) * H2 + each, mask=mask, other=0)
    tl.store(totals_ptr + pid, tl.sum(held))
    tl.store(before_ptr + pid * H2 + each, tl.cumsum(held, 0) - held, mask=each < H2)
    leaf_pid = tl.num_programs(0) + pid
    leaves = num_leaves(held, TABLE)
    tl.store(totals_ptr + leaf_pid, tl.sum(leaves))
    tl.store(before_ptr + leaf_pid * H2 + each, tl.cumsum(leaves, 0) - leaves, mask=each < H2)
    num = tl.num_programs(0)
    if is_last(ticket_ptr, num):
        scan(totals_ptr, first_ptr, ring_ends_ptr, leaf_ends_ptr, overruns_ptr, num, False, SCAN)


@triton.jit
def _give_back_tier(
    table, held, first, first_leaf, free_ring_ptr, free_leaves_ptr, num_pages, leaf_ring,
    TIER: tl.constexpr, TABLE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    for start in range(0, held, B):
        number = start + tl.arange(0, B)
        page = page_where(table, number, number < held, TIER, TABLE)
        tl.store(free_ring_ptr + (first + number) % num_pages, page, mask=number < held)
    tl.debug_barrier()  # entries of the directory are read above by other threads
    for start in range(0, num_leaves(held, TABLE), B):
        number = start + tl.arange(0, B)
        mask = number < num_leaves(held, TABLE)
        at = table[1] + leaf_column(number, TIER, TABLE)
        leaf = tl.load(at, mask=mask, other=0)
        tl.store(free_leaves_ptr + (first_leaf + number) % leaf_ring, leaf, mask=mask)
        tl.store(at, -1, mask=mask)


@triton.jit(do_not_specialize=["first_layer", "num_layers"])
def _give_back_kernel(
    slots_ptr,  # [R]
    first_ptr,  # [2, R, num_layers] i64
    before_ptr,  # [2, R, num_layers, H, 2]
    free_ring_ptr,  # [num_pages]
    leaves_ptr,  # [num_leaves, E]
    free_leaves_ptr,  # [num_leaves]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    held_ptr,  # [S, L, H, 2]
    first_layer,
    num_layers,
    num_pages,
    leaf_ring,
    L: tl.constexpr,
    H: tl.constexpr,
    TABLE: tl.constexpr,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per (request, layer) and (head, tier)."""
    wait(PDL)
    launch_dependents(PDL)
    pid = tl.program_id(0).to(tl.int64)
    each = tl.program_id(1)
    slot = tl.load(slots_ptr + pid // num_layers).to(tl.int64)
    if slot >= 0:
        row = (slot * L + first_layer + pid % num_layers) * H + each // 2
        tier = each % 2
        held = tl.load(held_ptr + row * 2 + tier)
        first = tl.load(first_ptr + pid) + tl.load(before_ptr + pid * (H * 2) + each)
        leaf_pid = tl.num_programs(0) + pid
        first_leaf = tl.load(first_ptr + leaf_pid) + tl.load(before_ptr + leaf_pid * (H * 2) + each)
        table = table_of(leaves_ptr, directory_ptr, row, TABLE)
        if tier == 0:
            _give_back_tier(
                table, held, first, first_leaf, free_ring_ptr, free_leaves_ptr, num_pages, leaf_ring,
                0, TABLE, B,
            )  # fmt: skip
        else:
            _give_back_tier(
                table, held, first, first_leaf, free_ring_ptr, free_leaves_ptr, num_pages, leaf_ring,
                1, TABLE, B,
            )  # fmt: skip
        tl.store(held_ptr + row * 2 + tier, 0)
        tl.store(num_tokens_ptr + row * 2 + tier, 0)


def release(state: PoolState, slots: Tensor, layer: int) -> None:
    """Same contract as `reference.release`. Two launches, whatever is released."""
    work = workspace(state)
    num_requests, heads = slots.numel(), state.num_kv_heads
    if layer >= 0:
        check_index("layer", layer, state.num_layers)
    check_tensor("slots", slots, work.device, torch.int32, num_requests)
    if not num_requests:
        return
    first_layer, num_layers = (layer, 1) if layer >= 0 else (0, state.num_layers)
    most = work.num_requests(num_requests) * state.num_layers
    rows = (2, num_requests, num_layers)
    totals = work.buffer("release_totals", torch.int32, *rows, least=2 * most)
    before = work.buffer("release_before", torch.int32, *rows, heads, 2, least=4 * most * heads)
    first = work.buffer("release_first", torch.int64, *rows, least=2 * most)
    launch(
        _count_kernel, (num_requests * num_layers,),
        slots, state.num_pages_held, totals, before, first, state.ring_ends, state.leaf_ends,
        state.overruns, work.ticket, first_layer, num_layers,
        L=state.num_layers, H2=2 * heads, H2_PADDED=power_of_2(2 * heads),
        TABLE=work.table, SCAN=SCAN_BLOCK, num_warps=4, **work.overlap,
    )  # fmt: skip
    launch(
        _give_back_kernel, (num_requests * num_layers, 2 * heads),
        slots, first, before, state.free_ring, state.leaves, state.free_leaves, state.directory,
        state.num_tokens, state.num_pages_held, first_layer, num_layers, state.num_pages,
        state.free_leaves.numel(), L=state.num_layers, H=heads, TABLE=work.table, B=PAGE_BLOCK,
        num_warps=1, **work.overlap,
    )  # fmt: skip
