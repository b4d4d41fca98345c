"""What a pool holds, and some of its rows: one launch, whatever is asked for."""

import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_report
from diffkv.kernels.triton.constants import power_of_2
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.workspace import workspace
from diffkv.state import PoolState

__all__ = ["report"]

MAX_BLOCK = 1024
"""Heads that a program looks at at a time, at most."""


@triton.jit
def _added(held, number, count, TOKENS: tl.constexpr):
    """Pages that so many tokens add to a tier of each of some heads."""
    return tl.cdiv(tl.maximum(count - (held * TOKENS - number), 0), TOKENS)


@triton.jit
def _report_kernel(
    slots_ptr,  # [R]
    num_tokens_ptr,  # [S, L, H, 2]
    held_ptr,  # [S, L, H, 2]
    ring_ends_ptr,  # [2]
    demotions_ptr,  # [1]
    overruns_ptr,  # [1]
    numbers_ptr,  # [1 + R, 3 + MOST] i64, out
    HEADS: tl.constexpr,  # L * H
    HIGH: tl.constexpr,  # tokens of a page
    LOW: tl.constexpr,  # likewise; 0 without a low tier
    MOST: tl.constexpr,
    B: tl.constexpr,
):
    """The first program for the pool, and one for each row."""
    pid = tl.program_id(0)
    row_ptr = numbers_ptr + pid * (3 + MOST)
    if pid == 0:
        tl.store(row_ptr, tl.load(overruns_ptr).to(tl.int64))
        tl.store(row_ptr + 1, tl.load(ring_ends_ptr + 1) - tl.load(ring_ends_ptr))
        tl.store(row_ptr + 2, tl.load(demotions_ptr))
        for column in tl.static_range(MOST):
            tl.store(row_ptr + 3 + column, 0)
    else:
        slot = tl.load(slots_ptr + pid - 1).to(tl.int64)
        num_heads = tl.where(slot >= 0, HEADS, 0)
        pages = tl.zeros([], tl.int64)
        num_high = tl.zeros([], tl.int64)
        num_low = tl.zeros([], tl.int64)
        for start in range(0, HEADS, B):
            mask = start + tl.arange(0, B) < num_heads
            at = (slot * HEADS + start + tl.arange(0, B)) * 2
            pages += tl.sum(tl.load(held_ptr + at, mask=mask, other=0).to(tl.int64))
            pages += tl.sum(tl.load(held_ptr + at + 1, mask=mask, other=0).to(tl.int64))
            num_high += tl.sum(tl.load(num_tokens_ptr + at, mask=mask, other=0).to(tl.int64))
            num_low += tl.sum(tl.load(num_tokens_ptr + at + 1, mask=mask, other=0).to(tl.int64))
        tl.store(row_ptr, pages)
        tl.store(row_ptr + 1, num_high)
        tl.store(row_ptr + 2, num_low)
        for more in tl.static_range(1, MOST + 1):
            growth = tl.zeros([], tl.int64)
            for start in range(0, HEADS, B):
                mask = start + tl.arange(0, B) < num_heads
                at = (slot * HEADS + start + tl.arange(0, B)) * 2
                held = tl.load(held_ptr + at, mask=mask, other=0)
                high = tl.load(num_tokens_ptr + at, mask=mask, other=0)
                worst = _added(held, high, more, HIGH)
                if LOW > 0:
                    low_held = tl.load(held_ptr + at + 1, mask=mask, other=0)
                    low = tl.load(num_tokens_ptr + at + 1, mask=mask, other=0)
                    for count in tl.static_range(more):
                        split = _added(held, high, count, HIGH)
                        split += _added(low_held, low, more - count, LOW)
                        worst = tl.maximum(worst, split)
                growth += tl.sum(tl.where(mask, worst, 0).to(tl.int64))
            tl.store(row_ptr + 2 + more, growth)


def report(state: PoolState, slots: Tensor, numbers: Tensor) -> None:
    """Same contract as `reference.report`. One launch."""
    work = workspace(state)
    most = check_report(slots, numbers, work.device)
    heads, tiers = state.num_layers * state.num_kv_heads, state.layout.tiers
    launch(
        _report_kernel, (len(numbers),),
        slots, state.num_tokens, state.num_pages_held, state.ring_ends, state.demotions,
        state.overruns, numbers, HEADS=heads, HIGH=tiers[0].tokens_per_page,
        LOW=tiers[1].tokens_per_page if len(tiers) > 1 else 0, MOST=most,
        B=min(MAX_BLOCK, power_of_2(heads)), num_warps=4,
    )  # fmt: skip
