"""Write new tokens where a plan says, and demote what they replace."""

import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_index, check_new_tokens
from diffkv.kernels.triton.codes import (
    code_pointers,
    load_elements,
    meta_pointers,
    plane_elements,
    position_pointers,
    store_vectors,
    sum_pointers,
)
from diffkv.kernels.triton.constants import cdiv, power_of_2
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.order import launch_dependents, wait
from diffkv.kernels.triton.rotate import rotated, rotation_of
from diffkv.kernels.triton.table import centre_of
from diffkv.kernels.triton.workspace import workspace
from diffkv.state import DecodePlan, PoolState

__all__ = ["append", "append_programs", "append_side"]

SIDES = 2
"""Keys and values are of different programs, so that neither waits for the loads of the other."""

HEADS = 4
"""Heads of a program of `append_side`, of one request or of several."""

MAX_REGISTERS = 80
"""Of a thread: the compiler would rather spill than take more than 64."""

_SIDES = tl.constexpr(SIDES)
_HEADS = tl.constexpr(HEADS)


@triton.jit
def _demote_side(
    page_ptr,
    index,
    low_ptr,
    low_index,
    mask,
    S: tl.constexpr,
    LOW: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Requantise token `index` of high pages into token `low_index` of low ones. All [T]."""
    element, exists = plane_elements(LOW)
    code_ptr = code_pointers(page_ptr, index, S)[:, None, None]
    meta_ptr = meta_pointers(page_ptr, index, S)[:, None, None]
    x = load_elements(code_ptr, meta_ptr, element, exists & mask[:, None, None], S, DTYPE)
    low_code_ptr = code_pointers(low_ptr, low_index, LOW)
    store_vectors(x, low_code_ptr, meta_pointers(low_ptr, low_index, LOW), mask, LOW, DTYPE)


@triton.jit
def _write_new(x, page_ptr, index, mask, S: tl.constexpr, DTYPE: tl.constexpr):
    """Write new tokens' vectors [T, DP]. Masks and places are [T]."""
    element, exists = plane_elements(S)
    place = tl.where(exists, element, 0).reshape([1, S.planes * S.padded])
    place = tl.broadcast_to(place, [x.shape[0], S.planes * S.padded])
    x = tl.gather(x, place, 1).reshape([x.shape[0], S.planes, S.padded])
    code_ptr = code_pointers(page_ptr, index, S)
    store_vectors(x, code_ptr, meta_pointers(page_ptr, index, S), mask, S, DTYPE)


@triton.jit
def append_side(
    number,
    slots_ptr,  # [R]
    centres_ptr,  # [S, L, H, D or 0] bf16
    positions_ptr,  # [R]
    places_ptr,  # [R, L, H, 4]
    key_ptr,  # [R, H, D]
    value_ptr,  # [R, H, D]
    signs_ptr,  # [D] f32
    pages_ptr,  # [num_pages, PAGE]
    key_stride,
    value_stride,
    norm,
    layer,
    R_H,
    L: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    TIERS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """The keys (even numbers) or the values of HEADS heads: `append_programs` in all.

    What can be is read before anything is waited for: a few requests take as long as their loads.
    """
    DTYPE: tl.constexpr = key_ptr.dtype.element_ty
    HIGH: tl.constexpr = TIERS[0]
    HIGH_K: tl.constexpr = HIGH.k
    HIGH_V: tl.constexpr = HIGH.v
    is_key = number % _SIDES == 0
    each = number // _SIDES * _HEADS + tl.arange(0, _HEADS)
    is_head = each < R_H
    head = each % H
    r = (each // H).to(tl.int64)
    place_ptr = places_ptr + ((r * L + layer) * H + head) * 4
    page = tl.load(place_ptr, mask=is_head, other=-1).to(tl.int64)
    index = tl.load(place_ptr + 1, mask=is_head, other=0)
    slot = tl.load(slots_ptr + r, mask=is_head, other=-1)
    position = tl.load(positions_ptr + r, mask=is_head, other=0)
    d = tl.arange(0, DP)[None, :]
    if is_key:
        x_ptr = key_ptr + r * key_stride
    else:
        x_ptr = value_ptr + r * value_stride
    x_ptr += head * D
    x = tl.load(x_ptr[:, None] + d, mask=is_head[:, None] & (d < D), other=0.0).to(tl.float32)
    if ROTATED:
        sign = tl.load(signs_ptr + tl.arange(0, DP), mask=tl.arange(0, DP) < D, other=0.0)
    mask = (slot >= 0) & (page >= 0)
    page_ptr = pages_ptr + page * PAGE
    if CENTRED:
        row = (slot.to(tl.int64) * L + layer) * H + head
        centre_ptr = centre_of(centres_ptr, row, HIGH_K)[:, None] + d
        centred = d < tl.where(is_key, D, 0)
        centre = tl.load(centre_ptr, mask=mask[:, None] & centred, other=0.0)
    if len(TIERS) > 1:
        LOW: tl.constexpr = TIERS[1]
        LOW_K: tl.constexpr = LOW.k
        LOW_V: tl.constexpr = LOW.v
        low_page = tl.load(place_ptr + 2, mask=is_head, other=-1).to(tl.int64)
        low_index = tl.load(place_ptr + 3, mask=is_head, other=0)
        demotes = mask & (low_page >= 0)
        if tl.max(demotes.to(tl.int32), 0) > 0:
            low_ptr = pages_ptr + low_page * PAGE
            if is_key:
                _demote_side(page_ptr, index, low_ptr, low_index, demotes, HIGH_K, LOW_K, DTYPE)
                if LOW.tracked:
                    total = tl.load(sum_pointers(page_ptr, index, HIGH), mask=demotes, other=0.0)
                    old = tl.load(position_pointers(page_ptr, index, HIGH), mask=demotes, other=0)
                    tl.store(sum_pointers(low_ptr, low_index, LOW), total, mask=demotes)
                    tl.store(position_pointers(low_ptr, low_index, LOW), old, mask=demotes)
            else:
                _demote_side(page_ptr, index, low_ptr, low_index, demotes, HIGH_V, LOW_V, DTYPE)
            # An old token is read by other threads than those that overwrite it
            tl.debug_barrier()
    if ROTATED:
        x = rotated(x, sign, norm, DTYPE, _HEADS, DP, BLOCK, False).to(tl.float32)
    if CENTRED:
        x -= centre.to(tl.float32)
    if is_key:
        _write_new(x, page_ptr, index, mask, HIGH_K, DTYPE)
        if HIGH.tracked:
            tl.store(sum_pointers(page_ptr, index, HIGH), tl.zeros([_HEADS], tl.float32), mask=mask)
            tl.store(position_pointers(page_ptr, index, HIGH), position, mask=mask)
    else:
        _write_new(x, page_ptr, index, mask, HIGH_V, DTYPE)


@triton.jit(do_not_specialize=["layer", "R_H"])
def _append_kernel(
    slots_ptr,
    centres_ptr,
    positions_ptr,
    places_ptr,
    key_ptr,
    value_ptr,
    signs_ptr,
    pages_ptr,
    key_stride,
    value_stride,
    norm,
    layer,
    R_H,
    L: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
    TIERS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Only `append_side`, whose parameters it repeats: Triton has no *args."""
    wait(PDL)
    launch_dependents(PDL)
    append_side(
        tl.program_id(0), slots_ptr, centres_ptr, positions_ptr, places_ptr, key_ptr, value_ptr,
        signs_ptr, pages_ptr, key_stride, value_stride, norm, layer, R_H, L, H, D, DP, PAGE, TIERS,
        CENTRED, BLOCK, ROTATED,
    )  # fmt: skip


def append_programs(num_heads: int) -> int:
    """Programs of `append_side` for so many heads, of all requests."""
    return SIDES * cdiv(num_heads, HEADS)


def append(
    state: PoolState,
    layer: int,
    plan: DecodePlan,
    key: Tensor,
    value: Tensor,
    signs: Tensor | None = None,
) -> None:
    """Same contract as `reference.append`. Rows of key and value may be apart."""
    work = workspace(state)
    num_requests, heads, head_dim = plan.slots.numel(), state.num_kv_heads, state.layout.head_dim
    check_index("layer", layer, state.num_layers)
    key_stride, value_stride = check_new_tokens(state, plan, key, value, work.device)
    rotation = rotation_of(signs, head_dim, work.device)
    if not num_requests:
        return
    launch(
        _append_kernel, (append_programs(num_requests * heads),),
        plan.slots, state.centres, plan.positions, plan.places, key, value,
        rotation.signs, state.pages, key_stride, value_stride, rotation.norm, layer,
        num_requests * heads, L=state.num_layers, H=heads, D=head_dim, DP=power_of_2(head_dim),
        PAGE=state.layout.page_bytes, TIERS=work.tiers, CENTRED=state.centre_dim > 0,
        enable_fp_fusion=False, num_warps=4, maxnreg=MAX_REGISTERS, **rotation.constants, **work.overlap,
    )  # fmt: skip
