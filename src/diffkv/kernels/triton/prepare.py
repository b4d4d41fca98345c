"""The first launch of attention: list the work, rotate the queries, and write new tokens."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.triton.append import append_programs, append_side
from diffkv.kernels.triton.constants import cdiv, power_of_2
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.order import launch_dependents, wait
from diffkv.kernels.triton.rotate import Rotation, rotated
from diffkv.kernels.triton.worklist import list_kernel
from diffkv.state import NewTokens, PoolState

__all__ = ["prepare"]

LIST_ROWS = 8

VECTORS = 4
"""Queries that a program rotates."""


@triton.jit(
    do_not_specialize=[
        "layer", "R_H", "programs", "room", "closed_room", "lists", "num_queries", "num_new",
    ]
)  # fmt: skip
def _prepare_kernel(
    slots_ptr,  # [R]
    chain_lens_ptr,  # [S]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    items_ptr,  # [., ITEM_FIELDS] out
    row_items_ptr,  # [R * H, ROW_FIELDS] out
    num_items_ptr,  # [LISTS + 1] out
    query_ptr,  # [R, H * G, D]
    signs_ptr,  # [D] f32
    q_ptr,  # [R, H * G, D] out
    new_slots_ptr,  # and until `value_stride` as `append_side` takes them
    centres_ptr,
    positions_ptr,
    places_ptr,
    key_ptr,
    value_ptr,
    pages_ptr,
    key_stride,
    value_stride,
    query_stride,
    norm,
    layer,
    R_H,
    programs,
    room,
    closed_room,
    lists,  # programs that list work
    num_queries,
    num_new,  # heads that have a new token
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TABLE: tl.constexpr,
    TIERS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    MAX: tl.constexpr,
    CHAIN_WIDTH: tl.constexpr,
    LONGER: tl.constexpr,
    CLOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    NEW: tl.constexpr,
    PAGE: tl.constexpr,
    CENTRED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first programs list the work (`list_kernel`), the next ones put queries together, rotated.

    The last ones write new tokens (`append_side`), where there are any: a plan has counted them, so
    that neither of the others needs them.
    """
    wait(PDL)
    launch_dependents(PDL)
    pid = tl.program_id(0)
    others = lists + tl.cdiv(num_queries, VECTORS)
    if pid < lists:
        list_kernel(
            slots_ptr, chain_lens_ptr, directory_ptr, num_tokens_ptr, items_ptr, row_items_ptr,
            num_items_ptr, layer, R_H, programs, room, closed_room, L, H, TABLE, TIERS, TILE, TOKENS,
            MAX, CHAIN_WIDTH, LONGER, CLOSED, ROWS, COUNT,
        )  # fmt: skip
    elif pid < others:
        vector = (pid - lists) * VECTORS + tl.arange(0, VECTORS)
        d = tl.arange(0, DP)
        mask = (vector < num_queries)[:, None] & (d < D)[None, :]
        r = (vector // (H * G)).to(tl.int64)
        at = (r * query_stride + vector % (H * G) * D)[:, None] + d[None, :]
        y = tl.load(query_ptr + at, mask=mask, other=0.0)
        if ROTATED:
            sign = tl.load(signs_ptr + d, mask=d < D, other=0.0)
            y = y.to(tl.float32)
            y = rotated(y, sign, norm, q_ptr.dtype.element_ty, VECTORS, DP, BLOCK, False)
        tl.store(q_ptr + vector.to(tl.int64)[:, None] * D + d[None, :], y, mask=mask)
    elif NEW:
        append_side(
            pid - others, new_slots_ptr, centres_ptr, positions_ptr, places_ptr, key_ptr, value_ptr,
            signs_ptr, pages_ptr, key_stride, value_stride, norm, layer, num_new, L, H, D, DP, PAGE,
            TIERS, CENTRED, BLOCK, ROTATED,
        )  # fmt: skip


def prepare(
    state: PoolState,
    layer: int,
    slots: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    limits: tuple[int, int, int],
    query: Tensor,
    turned: Tensor,
    rotation: Rotation,
    new: NewTokens | None,
    constants: dict[str, Any],
) -> None:
    """List a layer's work, rotate its queries, and write its new tokens.

    Args:
        state: the pool.
        layer: number of the layer.
        slots: [R] int32, the open rows.
        lists: items, those of each row, and their number, written.
        limits: what a list of open rows has room for, one of closed rows, and how many programs attend.
        query: [R, num_q_heads, head_dim], rows maybe apart.
        turned: the same, rotated and contiguous, written.
        rotation: of the queries, and of new keys and values.
        new: see `reference.attend`; checked.
        constants: those of `list_kernel` that attention has, too, and how launches overlap.
    """
    (room, closed_room, programs), heads = limits, state.num_kv_heads
    rows, num_queries = len(slots) * heads, query.shape[0] * query.shape[1]
    head_dim, num_lists = query.shape[2], cdiv(rows, LIST_ROWS)
    programs_in_all = num_lists + cdiv(num_queries, VECTORS)
    # Where nothing is new, tensors of the same kinds stand for what is not read
    appended, strides = (slots, state.centres, slots, slots, query, query, state.pages), (0, 0)
    num_new = 0
    if new is not None:
        plan, key, value = new.plan, new.key, new.value
        appended = (
            plan.slots, state.centres, plan.positions, plan.places, key, value, state.pages
        )  # fmt: skip
        strides = key.stride(0), value.stride(0)
        num_new = plan.slots.numel() * heads
        programs_in_all += append_programs(num_new)
    launch(
        _prepare_kernel, (programs_in_all,),
        slots, state.chain_lens, state.directory, state.num_tokens, *lists, query, rotation.signs,
        turned, *appended, *strides, query.stride(0), rotation.norm, layer, rows, programs, room,
        closed_room, num_lists, num_queries, num_new,
        G=query.shape[1] // heads, D=head_dim, DP=power_of_2(head_dim),
        CHAIN_WIDTH=state.chain_width, ROWS=LIST_ROWS,
        VECTORS=VECTORS, NEW=new is not None, PAGE=state.layout.page_bytes,
        CENTRED=state.centre_dim > 0,
        enable_fp_fusion=False, num_warps=4, **rotation.constants, **constants,
    )  # fmt: skip
