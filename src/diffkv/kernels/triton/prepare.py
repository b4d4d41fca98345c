"""The first launch of attention: list the work, and rotate the queries."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.order import launch_dependents, wait
from diffkv.kernels.triton.rotate import Rotation, rotated
from diffkv.kernels.triton.worklist import list_kernel
from diffkv.state import PoolState

__all__ = ["prepare"]

LIST_ROWS = 8
LIST_COUNT = 1024

VECTORS = 4
"""Queries that a program rotates."""


@triton.jit(do_not_specialize=["layer", "R_H", "programs", "room", "lists", "num_queries"])
def _prepare_kernel(
    slots_ptr,  # [R]
    chain_lens_ptr,  # [S]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    items_ptr,  # [., ITEM_FIELDS] out
    row_items_ptr,  # [R * H, ROW_FIELDS] out
    num_items_ptr,  # [3] out
    query_ptr,  # [R, H * G, D]
    signs_ptr,  # [D] f32
    q_ptr,  # [R, H * G, D] out
    query_stride,
    norm,
    layer,
    R_H,
    programs,
    room,
    lists,  # programs that list work
    num_queries,
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
    CLOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    FOLLOWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first programs list the work (`list_kernel`), the others put queries together, rotated.

    FOLLOWS: nothing of it needs what the launch ahead does, which is `append`'s and has itself waited.
    """
    if not FOLLOWS:
        wait(PDL)
    launch_dependents(PDL)
    pid = tl.program_id(0)
    if pid < lists:
        list_kernel(
            slots_ptr, chain_lens_ptr, directory_ptr, num_tokens_ptr, items_ptr, row_items_ptr,
            num_items_ptr, layer, R_H, programs, room, L, H, TABLE, TIERS, TILE, TOKENS, MAX,
            CHAIN_WIDTH, CLOSED, ROWS, COUNT,
        )  # fmt: skip
    else:
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
    if FOLLOWS:
        wait(PDL)


def prepare(
    state: PoolState,
    layer: int,
    slots: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    limits: tuple[int, int],
    query: Tensor,
    turned: Tensor,
    rotation: Rotation,
    follows_append: bool,
    constants: dict[str, Any],
) -> None:
    """List a layer's work, and rotate its queries.

    Args:
        state: the pool.
        layer: number of the layer.
        slots: [R] int32, the open rows.
        lists: items, those of each row, and their number, written.
        limits: the first item of closed rows, and how many programs attend.
        query: [R, num_q_heads, head_dim], rows maybe apart.
        turned: the same, rotated and contiguous, written.
        rotation: of the queries.
        follows_append: see `reference.attend`.
        constants: those of `list_kernel` that attention has, too, and how launches overlap.
    """
    (room, programs), heads = limits, state.num_kv_heads
    rows, num_queries = len(slots) * heads, query.shape[0] * query.shape[1]
    head_dim, num_lists = query.shape[2], triton.cdiv(rows, LIST_ROWS)
    launch(
        _prepare_kernel, (num_lists + triton.cdiv(num_queries, VECTORS),),
        slots, state.chain_lens, state.directory, state.num_tokens, *lists, query, rotation.signs,
        turned, query.stride(0), rotation.norm, layer, rows, programs, room, num_lists, num_queries,
        G=query.shape[1] // heads, D=head_dim, DP=triton.next_power_of_2(head_dim),
        CHAIN_WIDTH=state.chain_width, ROWS=LIST_ROWS, COUNT=LIST_COUNT, VECTORS=VECTORS,
        FOLLOWS=follows_append, num_warps=4, **rotation.constants, **constants,
    )  # fmt: skip
