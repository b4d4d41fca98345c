"""Device functions for the free rings: prefix sums give every head its own slice.

The rings' ends move in launches of their own, after or before the one that reads or writes entries.
"""

import triton
import triton.language as tl

__all__ = ["is_last", "scan"]


@triton.jit
def is_last(ticket_ptr, programs):
    """Whether all other programs of a launch have come here; what they wrote before can be read then.

    The ticket is 0 before, and again for the next launch.
    """
    # One thread takes the ticket, with what all have written; then all read, after it has
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.debug_barrier()
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def _counts(counts_ptr, start, N, B: tl.constexpr):
    """Pages and leaves that B of them count, and where they are."""
    at = start + tl.arange(0, B)
    pages = tl.load(counts_ptr + at, mask=at < N, other=0).to(tl.int64)
    leaves = tl.load(counts_ptr + N + at, mask=at < N, other=0).to(tl.int64)
    return pages, leaves, at


@triton.jit
def scan(
    counts_ptr, first_ptr, ring_ends_ptr, leaf_ends_ptr, overruns_ptr, N, TAKE: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Take entries from the rings, or make room to give them back; one program does.

    counts: [2, N] i32, of pages and of leaves. first: [2, N] i64, written: ring index of each one's
    first entry; -1 after an overrun.
    """
    END: tl.constexpr = 0 if TAKE else 1
    page_end = tl.load(ring_ends_ptr + END)
    leaf_end = tl.load(leaf_ends_ptr + END)
    fits = page_end >= 0
    if TAKE:
        tail = tl.load(ring_ends_ptr + 1)
        total = tl.zeros([], tl.int64)
        for start in range(0, N, B):
            pages, _, _ = _counts(counts_ptr, start, N, B)
            total += tl.sum(pages)
        fits = total <= tail - page_end
    for start in range(0, N, B):
        pages, leaves, at = _counts(counts_ptr, start, N, B)
        first = tl.where(fits, page_end + tl.cumsum(pages, 0) - pages, -1)
        first_leaf = tl.where(fits, leaf_end + tl.cumsum(leaves, 0) - leaves, -1)
        tl.store(first_ptr + at, first, mask=at < N)
        tl.store(first_ptr + N + at, first_leaf, mask=at < N)
        page_end += tl.sum(pages)
        leaf_end += tl.sum(leaves)
    if fits:
        tl.store(ring_ends_ptr + END, page_end)
        tl.store(leaf_ends_ptr + END, leaf_end)
    else:
        tl.store(overruns_ptr, tl.load(overruns_ptr) + 1)
