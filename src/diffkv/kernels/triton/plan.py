"""Plan a decode step: one decision per head, and the pages that they need, for all layers at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_tensor
from diffkv.kernels.triton.codes import position_pointers, sum_pointers
from diffkv.kernels.triton.constants import cdiv
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.table import enter_page, page_where, table_of
from diffkv.kernels.triton.workspace import workspace
from diffkv.policy import SCORED_QUERIES
from diffkv.state import DecodePlan, PoolState

__all__ = ["plan_decode"]

SEARCH_TOKENS = 512
"""Tokens that a program looks at at a time for a victim."""

APPLY_HEADS = 256
COUNT_BLOCK = 4096

_SCORED_QUERIES = tl.constexpr(SCORED_QUERIES)
_NOWHERE = tl.constexpr(-1)
_NO_SLOT = tl.constexpr(2**31 - 1)
_DEMOTES = tl.constexpr(4)
_GROWS = tl.constexpr(-2)  # in place of a page: the tier grows by a token, and maybe by a page


@triton.jit
def _least(
    pages_ptr,
    table,
    kept,
    num_tokens,
    prompt_len,
    TIER: tl.constexpr,
    T: tl.constexpr,
    TABLE: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    B: tl.constexpr,
):
    """(mean, page, index) of a head's candidate with the smallest mean, ties by position.

    Of a tier that is tracked.
    """
    best = tl.full([B], float("inf"), tl.float32)
    best_position = tl.zeros([B], tl.int32)
    best_token = tl.zeros([B], tl.int32)
    for start in range(0, kept, B):
        token = start + tl.arange(0, B)
        mask = token < kept
        page = page_where(table, token // T.tokens, mask, TIER, TABLE).to(tl.int64)
        page_ptr, index = pages_ptr + page * PAGE, token % T.tokens
        total = tl.load(sum_pointers(page_ptr, index, T), mask=mask, other=0.0)
        position = tl.load(position_pointers(page_ptr, index, T), mask=mask, other=0)
        scored = tl.maximum(position, prompt_len - _SCORED_QUERIES)
        first = tl.where(position < prompt_len, scored, position)
        candidate = mask & (position <= num_tokens - WINDOW)
        seen = tl.where(candidate, num_tokens - first, 1)
        mean = tl.div_rn(total, seen.to(tl.float32))
        better = (mean < best) | ((mean == best) & (position < best_position))
        better = better & candidate
        best = tl.where(better, mean, best)
        best_position = tl.where(better, position, best_position)
        best_token = tl.where(better, token, best_token)
    least = tl.min(best, 0)
    most = tl.full([B], 2147483647, tl.int32)
    first_position = tl.min(tl.where(best == least, best_position, most), 0)
    is_victim = (best == least) & (best_position == first_position)
    victim = tl.min(tl.where(is_victim, best_token, most), 0)
    # Where there is no candidate the place means nothing, and there may be no page to find
    exists = victim < kept
    page = page_where(table, victim // T.tokens, exists, TIER, TABLE)
    return least, page, victim % T.tokens


@triton.jit
def _threshold(alpha, num_tokens):
    """`policy.threshold` of one head."""
    threshold = tl.div_rn(alpha, tl.maximum(num_tokens, 1).to(tl.float32))
    return tl.minimum(tl.maximum(threshold, 0.0), 1.0)


@triton.jit
def _wanted(number, held, T: tl.constexpr, TABLE: tl.constexpr):
    """Need of one more token of a tier: 0 nothing, 1 a page, 3 a page that opens a leaf."""
    wanted = tl.where(held % TABLE.entries == 0, 3, 1)
    return tl.where(number == held * T.tokens, wanted, 0)


@triton.jit
def _decide_kernel(
    slots_ptr,  # [R]
    seq_lens_ptr,  # [R]
    pages_ptr,  # [num_pages, PAGE]
    leaves_ptr,  # [num_leaves, E]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    held_ptr,  # [S, L, H, 2]
    thresholds_ptr,  # [S, 2]
    prompt_lens_ptr,  # [S]
    wants_ptr,  # [R, L, H] i8, out: whether a page (1), whether it opens a leaf (2), and _DEMOTES
    places_ptr,  # [R, L, H, 4] out: _GROWS instead of a page where a tier grows
    positions_ptr,  # [R] out
    L: tl.constexpr,
    H: tl.constexpr,
    TABLE: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    TIERS: tl.constexpr,
    B: tl.constexpr,
):
    """One program per head."""
    HAS_LOW: tl.constexpr = len(TIERS) > 1
    HIGH: tl.constexpr = TIERS[0]
    LOW: tl.constexpr = TIERS[len(TIERS) - 1]
    pid = tl.program_id(0)
    r = pid // (L * H)
    slot = tl.load(slots_ptr + r).to(tl.int64)
    num_tokens = tl.load(seq_lens_ptr + r) - 1
    if pid % (L * H) == 0:
        tl.store(positions_ptr + r, num_tokens)
    page = tl.full([], _NOWHERE, tl.int32)
    index = tl.full([], _NOWHERE, tl.int32)
    low_page = tl.full([], _NOWHERE, tl.int32)
    low_index = tl.full([], _NOWHERE, tl.int32)
    want = tl.zeros([], tl.int32)
    if slot >= 0:
        row = slot * (L * H) + pid % (L * H)
        table = table_of(leaves_ptr, directory_ptr, row, TABLE)
        high = tl.load(num_tokens_ptr + row * 2)
        high_threshold = _threshold(tl.load(thresholds_ptr + slot * 2), num_tokens)
        low_threshold = _threshold(tl.load(thresholds_ptr + slot * 2 + 1), num_tokens)
        prompt_len = tl.load(prompt_lens_ptr + slot)
        # Sums are never negative, so without thresholds no mean is below one: nothing is searched
        searched = (high_threshold > 0.0) | (low_threshold > 0.0)
        least_high = tl.full([], float("inf"), tl.float32)
        if HIGH.tracked:
            least_high, page, index = _least(
                pages_ptr, table, tl.where(searched, high, 0), num_tokens, prompt_len,
                0, HIGH, TABLE, PAGE, WINDOW, B,
            )  # fmt: skip
        may_drop = least_high < low_threshold
        drop = may_drop
        demote = may_drop & False
        if HAS_LOW:
            low = tl.load(num_tokens_ptr + row * 2 + 1)
            may_demote = least_high < high_threshold
            least_low = tl.full([], float("inf"), tl.float32)
            if LOW.tracked:
                least_low, low_page, low_index = _least(
                    pages_ptr, table, tl.where(may_drop | may_demote, low, 0), num_tokens,
                    prompt_len, 1, LOW, TABLE, PAGE, WINDOW, B,
                )  # fmt: skip
            drop = may_drop & (least_high < least_low)
            demote = may_demote & ~drop
            evict = demote & (least_low < low_threshold)
            low_page = tl.where(evict, low_page, tl.where(demote, _GROWS, _NOWHERE))
            low_index = tl.where(evict, low_index, _NOWHERE)
            want = tl.where(
                demote & ~evict, _wanted(low, tl.load(held_ptr + row * 2 + 1), LOW, TABLE), 0
            )
            want += tl.where(demote, _DEMOTES, 0)
        grows = ~(drop | demote)
        page = tl.where(grows, _GROWS, page)
        index = tl.where(grows, _NOWHERE, index)
        want = tl.where(grows, _wanted(high, tl.load(held_ptr + row * 2), HIGH, TABLE), want)
    tl.store(wants_ptr + pid, want.to(tl.int8))
    at = places_ptr + pid.to(tl.int64) * 4
    tl.store(at, page)
    tl.store(at + 1, index)
    tl.store(at + 2, low_page)
    tl.store(at + 3, low_index)


@triton.jit
def _grow(
    row,
    grows,
    new_page,
    new_leaf,
    table,
    num_tokens_ptr,
    held_ptr,
    TIER: tl.constexpr,
    T: tl.constexpr,
    TABLE: tl.constexpr,
):
    """Count one more token of some heads, with the pages that they took; (page, index) of it."""
    held = tl.load(held_ptr + row * 2 + TIER, mask=grows, other=0)
    number = tl.load(num_tokens_ptr + row * 2 + TIER, mask=grows, other=0)
    takes = grows & (new_page >= 0)
    enter_page(table, held, new_page, takes, new_leaf, takes & (new_leaf >= 0), TIER, TABLE)
    tl.store(held_ptr + row * 2 + TIER, held + 1, mask=takes)
    tl.store(num_tokens_ptr + row * 2 + TIER, number + 1, mask=grows)
    page = page_where(table, number // T.tokens, grows & ~takes, TIER, TABLE)
    return tl.where(takes, new_page, page), number % T.tokens


@triton.jit(do_not_specialize=["N"])
def _apply_kernel(
    slots_ptr,  # [R]
    wants_ptr,  # [N] i8
    free_ring_ptr,  # [num_pages]
    ring_ends_ptr,  # [2]
    leaves_ptr,  # [num_leaves, E]
    free_leaves_ptr,  # [num_leaves]
    leaf_ends_ptr,  # [2]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    held_ptr,  # [S, L, H, 2]
    places_ptr,  # [N, 4]
    total_ptr,  # [3] i32, out: pages, leaves, demotions
    num_pages,
    num_leaves,
    N,
    HEADS: tl.constexpr,  # L * H
    TABLE: tl.constexpr,
    TIERS: tl.constexpr,
    B: tl.constexpr,
    COUNT: tl.constexpr,
):
    """B heads a program. Each finds by itself how many pages and leaves the heads before it want."""
    HIGH: tl.constexpr = TIERS[0]
    LOW: tl.constexpr = TIERS[len(TIERS) - 1]
    start = tl.program_id(0) * B
    before = tl.zeros([], tl.int32)
    total = tl.zeros([], tl.int32)
    leaves_before = tl.zeros([], tl.int32)
    total_leaves = tl.zeros([], tl.int32)
    demotions = tl.zeros([], tl.int32)
    for block in range(0, N, COUNT):
        at = block + tl.arange(0, COUNT)
        counts = tl.load(wants_ptr + at, mask=at < N, other=0).to(tl.int32)
        pages, leaves = counts & 1, counts >> 1 & 1
        total += tl.sum(pages)
        before += tl.sum(tl.where(at < start, pages, 0))
        total_leaves += tl.sum(leaves)
        leaves_before += tl.sum(tl.where(at < start, leaves, 0))
        demotions += tl.sum(counts // _DEMOTES)
    if start == 0:
        tl.store(total_ptr, total)
        tl.store(total_ptr + 1, total_leaves)
        tl.store(total_ptr + 2, demotions)
    ring_head = tl.load(ring_ends_ptr)
    fits = total <= tl.load(ring_ends_ptr + 1) - ring_head

    i = start + tl.arange(0, B)
    exists = i < N
    slot = tl.load(slots_ptr + i // HEADS, mask=exists, other=-1).to(tl.int64)
    row = slot * HEADS + i % HEADS
    changes = slot >= tl.where(fits, 0, _NO_SLOT)
    wants = tl.load(wants_ptr + i, mask=exists, other=0).to(tl.int32)
    page, leaf = wants & 1, wants >> 1 & 1
    ring_index = ring_head + before + tl.cumsum(page, 0) - page
    takes = changes & (page > 0)
    new_page = tl.load(free_ring_ptr + ring_index % num_pages, mask=takes, other=-1)
    leaf_index = tl.load(leaf_ends_ptr) + leaves_before + tl.cumsum(leaf, 0) - leaf
    opens = changes & (leaf > 0)
    new_leaf = tl.load(free_leaves_ptr + leaf_index % num_leaves, mask=opens, other=-1)
    table = table_of(leaves_ptr, directory_ptr, row, TABLE)

    place_ptr = places_ptr + i.to(tl.int64) * 4
    page = tl.load(place_ptr, mask=exists, other=-1)
    index = tl.load(place_ptr + 1, mask=exists, other=-1)
    low_page = tl.load(place_ptr + 2, mask=exists, other=-1)
    low_index = tl.load(place_ptr + 3, mask=exists, other=-1)
    high_grows = changes & (page == _GROWS)
    grown_page, grown_index = _grow(
        row, high_grows, new_page, new_leaf, table, num_tokens_ptr, held_ptr, 0, HIGH, TABLE
    )
    page = tl.where(high_grows, grown_page, page)
    index = tl.where(high_grows, grown_index, index)
    if len(TIERS) > 1:
        low_grows = changes & (low_page == _GROWS)
        grown_page, grown_index = _grow(
            row, low_grows, new_page, new_leaf, table, num_tokens_ptr, held_ptr, 1, LOW, TABLE
        )
        low_page = tl.where(low_grows, grown_page, low_page)
        low_index = tl.where(low_grows, grown_index, low_index)
    tl.store(place_ptr, tl.where(changes, page, -1), mask=exists)
    tl.store(place_ptr + 1, tl.where(changes, index, -1), mask=exists)
    tl.store(place_ptr + 2, tl.where(changes, low_page, -1), mask=exists)
    tl.store(place_ptr + 3, tl.where(changes, low_index, -1), mask=exists)


@triton.jit
def _finish_kernel(total_ptr, ring_ends_ptr, leaf_ends_ptr, demotions_ptr, overruns_ptr):
    """One program, after all others have read the rings."""
    total = tl.load(total_ptr)
    head = tl.load(ring_ends_ptr)
    if total <= tl.load(ring_ends_ptr + 1) - head:
        tl.store(ring_ends_ptr, head + total)
        tl.store(leaf_ends_ptr, tl.load(leaf_ends_ptr) + tl.load(total_ptr + 1))
        tl.store(demotions_ptr, tl.load(demotions_ptr) + tl.load(total_ptr + 2))
    else:
        tl.store(overruns_ptr, tl.load(overruns_ptr) + 1)


def plan_decode(state: PoolState, slots: Tensor, seq_lens: Tensor) -> DecodePlan:
    """Same contract as `reference.plan_decode`. Three launches.

    The plan's positions and places are scratch memory of the pool: the next plan overwrites them.
    """
    work = workspace(state)
    num_requests, layers, heads = slots.numel(), state.num_layers, state.num_kv_heads
    check_tensor("slots", slots, work.device, torch.int32, num_requests)
    check_tensor("seq_lens", seq_lens, work.device, torch.int32, num_requests)
    num, most = num_requests * layers * heads, work.num_requests(num_requests)
    i32 = torch.int32
    places = work.buffer(
        "plan_places", i32, num_requests, layers, heads, 4, least=4 * most * layers * heads
    )
    positions = work.buffer("plan_positions", i32, num_requests, least=most)
    wants = work.buffer("plan_wants", torch.int8, num, least=most * layers * heads)
    total = work.buffer("plan_total", i32, 3)
    plan = DecodePlan(slots, positions, places)
    if not num_requests:
        return plan
    launch(
        _decide_kernel, (num,),
        slots, seq_lens, state.pages, state.leaves, state.directory, state.num_tokens,
        state.num_pages_held, state.thresholds, state.prompt_lens, wants, places, positions,
        L=layers, H=heads, TABLE=work.table, PAGE=state.layout.page_bytes,
        WINDOW=state.window, TIERS=work.tiers, B=SEARCH_TOKENS, num_warps=4,
    )  # fmt: skip
    launch(
        _apply_kernel, (cdiv(num, APPLY_HEADS),),
        slots, wants, state.free_ring, state.ring_ends, state.leaves, state.free_leaves,
        state.leaf_ends, state.directory, state.num_tokens, state.num_pages_held, places, total,
        state.num_pages, len(state.free_leaves), num,
        HEADS=layers * heads, TABLE=work.table, TIERS=work.tiers, B=APPLY_HEADS,
        COUNT=COUNT_BLOCK, num_warps=4,
    )  # fmt: skip
    launch(
        _finish_kernel, (1,),
        total, state.ring_ends, state.leaf_ends, state.demotions, state.overruns, num_warps=1,
    )  # fmt: skip
    return plan
