"""Decode attention over both tiers: list the work, attend to every chunk, merge and add significance.

New tokens are written and queries rotated while the work is listed, and outputs back where they are
merged.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import (
    check_group,
    check_index,
    check_new_tokens,
    check_packed,
    check_tensor,
)
from diffkv.kernels.triton.batch import Batch
from diffkv.kernels.triton.chunk import attend_item
from diffkv.kernels.triton.closed import most_closed_chunks
from diffkv.kernels.triton.constants import DTYPES, MIN_HEADS, cdiv, power_of_2, tile_tokens
from diffkv.kernels.triton.finish import finish_kernel, recompute_kernel
from diffkv.kernels.triton.items import ITEM_FIELDS, LISTS, ROW_FIELDS, list_start
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.order import launch_dependents, wait
from diffkv.kernels.triton.prepare import prepare
from diffkv.kernels.triton.rotate import rotation_of
from diffkv.kernels.triton.worklist import most_chunk_pages, most_chunks, most_items
from diffkv.kernels.triton.workspace import Workspace, workspace
from diffkv.state import NewTokens, PoolState

__all__ = ["attend"]

LOG2_E = math.log2(math.e)

_TICKET = tl.constexpr(LISTS)

FINISH_PROGRAMS = 16
"""Programs of the last launch for each multiprocessor, beside those that merge."""

SCORE_SHARE = 64
"""Kept probabilities may take one part in so many of the pool's bytes, or MIN_SCORE_BYTES."""

MIN_SCORE_BYTES = 128 << 20


@triton.jit(do_not_specialize=["score_tiles", "layer", "room", "closed_room"])
def _attend_kernel(
    slots_ptr,  # [R]
    chains_ptr,  # [S, CHAIN_WIDTH]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    centres_ptr,  # [S, L, H, D or 0] bf16
    q_ptr,  # [R, H * G, D]
    pages_ptr,  # [num_pages, PAGE]
    leaves_ptr,  # [num_leaves, E]
    items_ptr,  # [., ITEM_FIELDS]
    num_items_ptr,  # [LISTS + 1] items of each list, and the next one to take
    partial_ptr,  # [items, G, D] f32, out
    lse_ptr,  # [items, G] f32, out, to base 2
    probs_ptr,  # [score_tiles, TILE, G] out
    most_ptr,  # [score_tiles, G] f32, out
    scale,
    score_tiles,
    layer,
    room,  # what lists of open rows have room for
    closed_room,  # those of closed ones
    L: tl.constexpr,
    H: tl.constexpr,
    TABLE: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    TIERS: tl.constexpr,
    TOKENS: tl.constexpr,
    CENTRED: tl.constexpr,
    CHAINED: tl.constexpr,
    RAW_DOT: tl.constexpr,
    CODE_DOT: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take items from the lists until none is left; who takes one changes no result."""
    wait(PDL)
    launch_dependents(PDL)
    num_high = tl.load(num_items_ptr + 3)
    closed_high = 0
    num_low = 0
    closed_low = 0
    if CHAINED:
        closed_high = tl.load(num_items_ptr + 2)
        num_high += closed_high
    if len(TIERS) > 1:
        num_low = tl.load(num_items_ptr + 1)
        if CHAINED:
            closed_low = tl.load(num_items_ptr)
            num_low += closed_low
    number = tl.program_id(0)
    while number < num_low + num_high:
        # Early, so that nothing waits for it; it orders nothing
        following = tl.atomic_add(num_items_ptr + _TICKET, 1, sem="relaxed")
        if number >= num_low:
            number -= num_low
            start = list_start(3, room, closed_room) - closed_high
            is_closed = number < closed_high
            attend_item(
                number + tl.where(is_closed, list_start(2, room, closed_room), start), is_closed,
                slots_ptr, chains_ptr, directory_ptr,
                num_tokens_ptr, centres_ptr, items_ptr,
                q_ptr, pages_ptr, leaves_ptr, partial_ptr, lse_ptr, probs_ptr, most_ptr, scale,
                score_tiles, layer, 0, TIERS, L, H, TABLE, G, HEADS, PAGE, TILE, TOKENS, CENTRED,
                CHAINED, RAW_DOT, CODE_DOT, FAST,
            )  # fmt: skip
        elif len(TIERS) > 1:
            start = list_start(1, room, closed_room) - closed_low
            is_closed = number < closed_low
            attend_item(
                number + tl.where(is_closed, 0, start), is_closed,
                slots_ptr, chains_ptr, directory_ptr,
                num_tokens_ptr, centres_ptr, items_ptr,
                q_ptr, pages_ptr, leaves_ptr, partial_ptr, lse_ptr, probs_ptr, most_ptr, scale,
                score_tiles, layer, 1, TIERS, L, H, TABLE, G, HEADS, PAGE, TILE, TOKENS, CENTRED,
                CHAINED, RAW_DOT, CODE_DOT, FAST,
            )  # fmt: skip
        number = following


def _score_tiles(
    state: PoolState, work: Workspace, rows: int, tokens: int, tile: int, tile_bytes: int
) -> tuple[int, bool]:
    """Tiles of one layer whose probabilities are kept, and whether that is all that rows can have.

    Every chunk of a tier with sums has tiles of its own, and a head's last one as many as a full one.
    """
    tracked = [tier.tokens_per_page for tier in state.layout.tiers if tier.tracked]
    if not tracked:
        return 0, True
    most_per_page = max(tracked)
    most_pages = most_chunk_pages(state.layout, _table(state), tokens)
    chunk_tiles = cdiv(most_pages * most_per_page, tile)
    full = cdiv(_most_pages(state, rows) * most_per_page, tile)
    every = full + rows * (most_chunks(_table(state)) + len(tracked) * chunk_tiles)
    tiles = work.tuning.score_tiles
    if tiles is None:
        budget = max(MIN_SCORE_BYTES, state.pages.numel() // SCORE_SHARE)
        tiles = min(every, budget // tile_bytes)
    return tiles, tiles >= every


def _table(state: PoolState) -> tuple[int, int]:
    return state.directory_width, state.leaf_entries


def _most_pages(state: PoolState, rows: int) -> int:
    return min(rows * state.max_pages, state.num_pages)


def _check(
    state: PoolState,
    layer: int,
    slots: Tensor,
    query: Tensor,
    scale: float,
    output: Tensor,
    new: NewTokens | None,
    device: torch.device,
) -> None:
    num_requests, num_q_heads, _ = query.shape
    check_index("layer", layer, state.num_layers)
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    check_group(num_q_heads, state.num_kv_heads)
    check_tensor("slots", slots, device, torch.int32, num_requests)
    shape = (num_requests, num_q_heads, state.layout.head_dim)
    check_tensor("output", output, device, state.dtype, *shape)
    check_packed("query", query, device, state.dtype, *shape)
    if new is not None:
        check_new_tokens(state, new.plan, new.key, new.value, device)


class _Scratch(NamedTuple):
    """Scratch memory of one call.

    Attributes:
        items: lists of items.
        row_items: those of each row.
        num_items: how many each list has.
        partial: outputs of items.
        lse: log-sum-exps of items.
        rooms: what a list of open rows has room for, and one of closed ones. Of these there are as many
            as every request can have: they may be shared, so pages are no bound.
        probs: probabilities of the tiles that are kept.
        most: their maxima.
        keeps_all: whether those are all tiles.
        query: the queries, put together.
    """

    items: Tensor
    row_items: Tensor
    num_items: Tensor
    partial: Tensor
    lse: Tensor
    rooms: tuple[int, int]
    probs: Tensor
    most: Tensor
    keeps_all: bool
    query: Tensor

    @classmethod
    def of(
        cls, state: PoolState, work: Workspace, query: Tensor, tokens: int, tile: int
    ) -> "_Scratch":
        """The memory for some queries, made for more, in chunks of so many tokens at least."""
        f32, i32 = torch.float32, torch.int32
        num_requests, num_q_heads, head_dim = query.shape
        group, rows = num_q_heads // state.num_kv_heads, num_requests * state.num_kv_heads
        most_requests = work.num_requests(num_requests)
        most_rows = most_requests * state.num_kv_heads
        pages = _most_pages(state, most_rows)
        room = most_items(state.layout, most_rows, pages, _table(state), work.tuning.chunk_tokens)
        most_closed = most_rows * most_closed_chunks(state.layout, state.chain_width)
        num, closed_room = room + most_closed, most_closed // len(state.layout.tiers)
        dtype = f32 if state.dtype is f32 else torch.float16
        tile_bytes = group * (tile * dtype.itemsize + f32.itemsize)
        tiles, keeps_all = _score_tiles(state, work, most_rows, tokens, tile, tile_bytes)
        return cls(
            work.buffer("items", i32, LISTS // 2 * (room + closed_room), ITEM_FIELDS),
            work.buffer("row_items", i32, rows, ROW_FIELDS, least=most_rows * ROW_FIELDS),
            work.buffer("num_items", i32, LISTS + 1),
            work.buffer("partial", f32, num, group, head_dim),
            work.buffer("lse", f32, num, group),
            (room, closed_room),
            work.buffer("probs", dtype, tiles, tile, group),
            work.buffer("most", f32, tiles, group),
            keeps_all,
            work.buffer(
                "query", state.dtype, *query.shape, least=most_requests * num_q_heads * head_dim
            ),
        )


def _products(state: PoolState, fast: bool) -> dict[str, Any]:
    """How scores and outputs are computed from what is stored."""
    dtype = DTYPES[state.dtype]
    # The interpreter has no products of bfloat16
    raw_dot = dtype if fast or dtype is not tl.bfloat16 else tl.float32
    code_dot = tl.float32 if dtype is tl.float32 else tl.float16
    centred = state.centre_dim > 0
    return {"RAW_DOT": raw_dot, "CODE_DOT": code_dot, "FAST": fast, "CENTRED": centred}


def _finishers(state: PoolState, work: Workspace, most: int) -> int:
    """Programs that add to sums, at most so many: none where no tier has any."""
    if not any(tier.tracked for tier in state.layout.tiers):
        return 0
    return min(most, work.multiprocessors * FINISH_PROGRAMS)


def _recompute(
    state: PoolState,
    layer: int,
    slots: Tensor,
    scratch: _Scratch,
    scale: float,
    programs: int,
    constants: dict[str, Any],
) -> None:
    """Add to the sums of tokens whose probabilities are not kept."""
    launch(
        recompute_kernel, (programs,),
        slots, state.centres, scratch.query, state.pages, state.leaves, scratch.items,
        scratch.num_items, scratch.row_items, scratch.lse, scale, len(scratch.most), layer,
        *scratch.rooms, L=state.num_layers, H=state.num_kv_heads, num_warps=1, num_stages=2,
        **constants,
    )  # fmt: skip


def attend(
    state: PoolState,
    layer: int,
    slots: Tensor,
    query: Tensor,
    scale: float,
    output: Tensor,
    signs: Tensor | None = None,
    new: NewTokens | None = None,
) -> None:
    """Same contract as `reference.attend`. Three launches, or four where probabilities are many.

    Rows of the query may be apart. Significance is deterministic: probabilities of tracked tiers
    are kept from the first pass, relative to their tile's maximum and in float16 unless the model is in
    float32, and added up in the last. Where no tier is tracked, that one only merges.

    Chunks of a crowd are larger (`Batch`): outputs are the same but for their last bits.
    """
    work = workspace(state)
    _check(state, layer, slots, query, scale, output, new, work.device)
    num_requests, num_q_heads, head_dim = query.shape
    rotation = rotation_of(signs, head_dim, work.device)
    if not num_requests:
        return
    tuning, heads = work.tuning, state.num_kv_heads
    group, rows = num_q_heads // heads, num_requests * heads
    tile = tuning.tile or tile_tokens(state.layout)
    batch = Batch.of(rows, state.segment, work)
    scratch = _Scratch.of(state, work, query, batch.chunk_tokens, tile)
    items, row_items, num_items, partial, lse, rooms, probs, most, keeps_all, turned = scratch
    score_tiles, group_padded = len(most), power_of_2(group)
    chunks, closed = most_chunks(_table(state)), most_closed_chunks(state.layout, state.chain_width)
    programs = min(rows * (chunks + closed), work.multiprocessors * batch.programs)
    tiles = {"TIERS": work.tiers, "TILE": tile, **work.overlap}
    tables = {"L": state.num_layers, "H": heads, "TABLE": work.table}
    prepare(
        state, layer, slots, (items, row_items, num_items), (*rooms, programs), query, turned, rotation,
        new, {"MAX": chunks, "CLOSED": closed, "TOKENS": batch.chunk_tokens, "LONGER": batch.longer,
              "COUNT": batch.counted, **tiles, **tables},
    )  # fmt: skip
    paged = {"G": group, "PAGE": state.layout.page_bytes, **tiles}
    shared = {"HEADS": max(MIN_HEADS, group_padded), **paged}
    products, scale = _products(state, tuning.fast), scale * LOG2_E
    launch(
        _attend_kernel, (programs,),
        slots, state.chains, state.directory, state.num_tokens, state.centres, turned, state.pages,
        state.leaves, items, num_items, partial, lse, probs, most, scale, score_tiles, layer, *rooms,
        CHAINED=state.chain_width > 0, TOKENS=tuning.chunk_tokens, num_warps=tuning.num_warps,
        num_stages=tuning.num_stages, maxnreg=batch.registers, **shared, **products, **tables,
    )  # fmt: skip
    launch(
        finish_kernel, (rows * group + _finishers(state, work, rows * chunks),),
        output, state.pages, state.leaves, items, num_items, row_items, partial, lse, probs, most,
        rotation.signs, rotation.norm, score_tiles, rows * group, *rooms,
        HEADS=group_padded, D=head_dim, D_PADDED=power_of_2(head_dim), MERGED=batch.merged,
        num_warps=1, num_stages=2, **paged, **rotation.constants,
    )  # fmt: skip
    if not keeps_all:
        _recompute(state, layer, slots, scratch, scale, programs, {**shared, **products})
