"""Device functions and a kernel for the free ring: prefix sums give every head its own slice.

The ring's ends move in programs of their own, after or before the launch that reads or writes entries.
"""

import triton
import triton.language as tl

__all__ = ["scan_kernel", "table_column"]


@triton.jit
def table_column(number, TIER: tl.constexpr, M: tl.constexpr):
    """Where page `number` of a tier is in a head's page table: low pages from the right."""
    if TIER == 0:
        column = number
    else:
        column = M - 1 - number
    return column


@triton.jit(do_not_specialize=["N"])
def scan_kernel(
    counts_ptr,  # [N] i32
    first_ptr,  # [N] i64, out: ring index of each one's first entry; -1 after an overrun
    ring_ends_ptr,  # [2] i64
    overruns_ptr,  # [1] i32
    N,
    TAKE: tl.constexpr,
    B: tl.constexpr,
):
    """One program: take `counts` entries from the ring, or make room to give them back."""
    head = tl.load(ring_ends_ptr)
    tail = tl.load(ring_ends_ptr + 1)
    offsets = tl.arange(0, B)
    total = tl.zeros([], tl.int64)
    for start in range(0, N, B):
        at = start + offsets
        total += tl.sum(tl.load(counts_ptr + at, mask=at < N, other=0).to(tl.int64))
    if TAKE:
        first = head
        fits = total <= tail - head
    else:
        first = tail
        fits = total >= 0
    before = tl.zeros([], tl.int64)
    for start in range(0, N, B):
        at = start + offsets
        count = tl.load(counts_ptr + at, mask=at < N, other=0).to(tl.int64)
        index = first + before + tl.cumsum(count, 0) - count
        tl.store(first_ptr + at, tl.where(fits, index, -1), mask=at < N)
        before += tl.sum(count)
    if fits:
        if TAKE:
            tl.store(ring_ends_ptr, head + total)
        else:
            tl.store(ring_ends_ptr + 1, tail + total)
    else:
        tl.store(overruns_ptr, tl.load(overruns_ptr) + 1)
