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
    plane_tile,
    position_pointers,
    store_vectors,
    sum_pointers,
    write_side,
    write_vectors,
)
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.order import launch_dependents, wait
from diffkv.kernels.triton.rotate import rotated, rotation_of
from diffkv.kernels.triton.table import centre_of
from diffkv.kernels.triton.workspace import workspace
from diffkv.state import DecodePlan, PoolState

__all__ = ["append"]


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
    """Requantise token `index` of a high page into token `low_index` of a low one. All [1]."""
    element, exists = plane_elements(LOW)
    code_ptr = code_pointers(page_ptr, index, S)[:, None, None]
    meta_ptr = meta_pointers(page_ptr, index, S)[:, None, None]
    x = load_elements(code_ptr, meta_ptr, element, exists & mask[:, None, None], S, DTYPE)
    low_code_ptr = code_pointers(low_ptr, low_index, LOW)
    store_vectors(x, low_code_ptr, meta_pointers(low_ptr, low_index, LOW), mask, LOW, DTYPE)


@triton.jit
def _write_new(
    x_ptr, signs_ptr, norm, centre_ptr, page_ptr, index, mask, S: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, ROTATED: tl.constexpr, DTYPE: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Write a new token's vector at `x_ptr`, rotated if that is asked for. Masks and places are [1]."""
    if ROTATED:
        d = tl.arange(0, DP)
        x = tl.load(x_ptr + d, mask=d < S.head_dim, other=0.0).to(tl.float32)
        sign = tl.load(signs_ptr + d, mask=d < S.head_dim, other=0.0)
        x = rotated(x[None, :], sign, norm, DTYPE, 1, DP, BLOCK, False).to(tl.float32)
        x = plane_tile(x, 1, DP, S)
        write_vectors(x, centre_ptr, page_ptr, index, mask, S, DTYPE, CENTRED)
    else:
        at = x_ptr + tl.arange(0, 1)
        write_side(at, centre_ptr, page_ptr, index, mask, S, DTYPE, CENTRED)


@triton.jit(do_not_specialize=["layer"])
def _append_kernel(
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
    """One program per request and head."""
    wait(PDL)
    launch_dependents(PDL)
    DTYPE: tl.constexpr = key_ptr.dtype.element_ty
    HIGH: tl.constexpr = TIERS[0]
    HIGH_K: tl.constexpr = HIGH.k
    HIGH_V: tl.constexpr = HIGH.v
    r = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    one = tl.arange(0, 1)
    place_ptr = places_ptr + ((r * L + layer) * H + head) * 4 + one
    page = tl.load(place_ptr).to(tl.int64)
    index = tl.load(place_ptr + 1)
    slot = tl.load(slots_ptr + r + one)
    mask = (slot >= 0) & (page >= 0)
    page_ptr = pages_ptr + page * PAGE
    if len(TIERS) > 1:
        LOW: tl.constexpr = TIERS[1]
        LOW_K: tl.constexpr = LOW.k
        LOW_V: tl.constexpr = LOW.v
        low_page = tl.load(place_ptr + 2).to(tl.int64)
        low_index = tl.load(place_ptr + 3)
        demotes = mask & (low_page >= 0)
        if tl.max(demotes.to(tl.int32), 0) > 0:
            low_ptr = pages_ptr + low_page * PAGE
            _demote_side(page_ptr, index, low_ptr, low_index, demotes, HIGH_K, LOW_K, DTYPE)
            _demote_side(page_ptr, index, low_ptr, low_index, demotes, HIGH_V, LOW_V, DTYPE)
            if LOW.tracked:
                total = tl.load(sum_pointers(page_ptr, index, HIGH), mask=demotes, other=0.0)
                position = tl.load(position_pointers(page_ptr, index, HIGH), mask=demotes, other=0)
                tl.store(sum_pointers(low_ptr, low_index, LOW), total, mask=demotes)
                tl.store(position_pointers(low_ptr, low_index, LOW), position, mask=demotes)
            # The old token is read by other threads than those that overwrite it
            tl.debug_barrier()
    row = (slot.to(tl.int64) * L + layer) * H + head
    centre_ptr = centre_of(centres_ptr, row, HIGH_K)
    _write_new(
        key_ptr + r * key_stride + head * D, signs_ptr, norm, centre_ptr, page_ptr, index, mask,
        HIGH_K, DP, BLOCK, ROTATED, DTYPE, CENTRED,
    )  # fmt: skip
    _write_new(
        value_ptr + r * value_stride + head * D, signs_ptr, norm, centre_ptr, page_ptr, index, mask,
        HIGH_V, DP, BLOCK, ROTATED, DTYPE, False,
    )  # fmt: skip
    if HIGH.tracked:
        tl.store(sum_pointers(page_ptr, index, HIGH), tl.zeros([1], tl.float32), mask=mask)
        position = tl.load(positions_ptr + r + one)
        tl.store(position_pointers(page_ptr, index, HIGH), position, mask=mask)


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
        _append_kernel, (num_requests, heads),
        plan.slots, state.centres, plan.positions, plan.places, key, value,
        rotation.signs, state.pages, key_stride, value_stride, rotation.norm, layer,
        L=state.num_layers, H=heads, D=head_dim, DP=triton.next_power_of_2(head_dim),
        PAGE=state.layout.page_bytes, TIERS=work.tiers, CENTRED=state.centre_dim > 0,
        enable_fp_fusion=False, num_warps=1, **rotation.constants, **work.overlap,
    )  # fmt: skip
