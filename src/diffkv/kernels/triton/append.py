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
    write_side,
)
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


@triton.jit(do_not_specialize=["layer"])
def _append_kernel(
    slots_ptr,  # [R]
    centres_ptr,  # [S, L, H, D or 0] bf16
    positions_ptr,  # [R]
    places_ptr,  # [R, L, H, 4]
    key_ptr,  # [R, H, D]
    value_ptr,  # [R, H, D]
    pages_ptr,  # [num_pages, PAGE]
    key_stride,
    value_stride,
    layer,
    L: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    TIERS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """One program per request and head."""
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
    at = head * D + one
    row = (slot.to(tl.int64) * L + layer) * H + head
    centre_ptr = centre_of(centres_ptr, row, HIGH_K)
    write_side(
        key_ptr + r * key_stride + at, centre_ptr, page_ptr, index, mask, HIGH_K, DTYPE, CENTRED
    )
    write_side(
        value_ptr + r * value_stride + at, centre_ptr, page_ptr, index, mask, HIGH_V, DTYPE, False
    )
    if HIGH.tracked:
        tl.store(sum_pointers(page_ptr, index, HIGH), tl.zeros([1], tl.float32), mask=mask)
        position = tl.load(positions_ptr + r + one)
        tl.store(position_pointers(page_ptr, index, HIGH), position, mask=mask)


def append(state: PoolState, layer: int, plan: DecodePlan, key: Tensor, value: Tensor) -> None:
    """Same contract as `reference.append`. Rows of key and value may be apart."""
    work = workspace(state)
    num_requests, heads, head_dim = plan.slots.numel(), state.num_kv_heads, state.layout.head_dim
    check_index("layer", layer, state.num_layers)
    key_stride, value_stride = check_new_tokens(state, plan, key, value, work.device)
    if not num_requests:
        return
    _append_kernel[(num_requests, heads)](
        plan.slots, state.centres, plan.positions, plan.places, key, value, state.pages,
        key_stride, value_stride, layer,
        L=state.num_layers, H=heads, D=head_dim, PAGE=state.layout.page_bytes, TIERS=work.tiers,
        CENTRED=state.centre_dim > 0, enable_fp_fusion=False, num_warps=1,
    )  # fmt: skip
