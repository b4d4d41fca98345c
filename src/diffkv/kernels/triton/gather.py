"""Read the tokens of a request back from pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.triton.check import check_layer
from diffkv.kernels.triton.codes import (
    code_pointers,
    load_elements,
    meta_pointers,
    rounded,
)
from diffkv.kernels.triton.facts import tile_vectors
from diffkv.kernels.triton.ring import table_column
from diffkv.kernels.triton.workspace import workspace
from diffkv.policy import DROPPED
from diffkv.state import PoolState

__all__ = ["gather"]

_DROPPED = tl.constexpr(DROPPED)


@triton.jit
def _load_side(x, page_ptr, index, element, mask, S: tl.constexpr, DTYPE: tl.constexpr):
    """x [T, D], with the rows of a mask replaced by what is stored."""
    code_ptr = code_pointers(page_ptr, index, S)[:, None]
    meta_ptr = meta_pointers(page_ptr, index, S)[:, None]
    mask = mask[:, None] & (element < S.head_dim)
    return tl.where(mask, load_elements(code_ptr, meta_ptr, element, mask, S, DTYPE), x)


@triton.jit
def _load_tier(
    key, value, position, number, element, mask, pages_ptr, table_ptr,
    TIER: tl.constexpr, TIERS: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys, values and positions, with tokens `number` of a tier where the mask says."""
    T: tl.constexpr = TIERS[TIER]
    K: tl.constexpr = T.k
    V: tl.constexpr = T.v
    column = table_column(number // T.tokens, TIER, M)
    page = tl.load(table_ptr + column, mask=mask, other=0).to(tl.int64)
    page_ptr = pages_ptr + page * PAGE
    index = number % T.tokens
    key = _load_side(key, page_ptr, index, element, mask, K, DTYPE)
    value = _load_side(value, page_ptr, index, element, mask, V, DTYPE)
    at = (page_ptr + T.positions + index * 4).to(tl.pointer_type(tl.int32))
    return key, value, tl.where(mask, tl.load(at, mask=mask, other=0), position)


@triton.jit(do_not_specialize=["slot", "layer", "N"])
def _gather_kernel(
    pages_ptr,  # [num_pages, PAGE]
    page_table_ptr,  # [S, L, H, M]
    num_tokens_ptr,  # [S, L, H, 2]
    key_ptr,  # [H, N, D], out
    value_ptr,  # [H, N, D], out
    positions_ptr,  # [H, N], out
    tiers_ptr,  # [H, N] i8, out
    slot,
    layer,
    N,
    L: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    TIERS: tl.constexpr,
    B: tl.constexpr,
):
    """One program per B tokens of a head: high ones, then low ones, then none."""
    NUM_TIERS: tl.constexpr = len(TIERS)
    DTYPE: tl.constexpr = key_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    head = tl.program_id(1).to(tl.int64)
    exists = i < N
    row = (slot.to(tl.int64) * L + layer) * H + head
    high = tl.load(num_tokens_ptr + row * 2)
    kept = high
    tier = tl.where(i < high, 0, _DROPPED)
    if NUM_TIERS > 1:
        kept = high + tl.load(num_tokens_ptr + row * 2 + 1)
        tier = tl.where((i >= high) & (i < kept), 1, tier)
    out = head * N + i
    position = tl.full([B], -1, tl.int32)
    element = tl.arange(0, D_PADDED)[None, :]
    key = tl.zeros([B, D_PADDED], tl.float32)
    value = tl.zeros([B, D_PADDED], tl.float32)
    for t in tl.static_range(NUM_TIERS):
        number = i - (high if t == 1 else 0)
        key, value, position = _load_tier(
            key, value, position, number, element, exists & (tier == t), pages_ptr,
            page_table_ptr + row * M, t, TIERS, M, PAGE, DTYPE,
        )  # fmt: skip
    at = out[:, None] * D + element
    in_vector = exists[:, None] & (element < D)
    tl.store(key_ptr + at, rounded(key, DTYPE), mask=in_vector)
    tl.store(value_ptr + at, rounded(value, DTYPE), mask=in_vector)
    tl.store(positions_ptr + out, position, mask=exists)
    tl.store(tiers_ptr + out, tier.to(tl.int8), mask=exists)


def gather(
    state: PoolState, layer: int, slot: int, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same contract as `reference.gather`."""
    work = workspace(state)
    check_layer(layer, state.num_layers)
    if not 0 <= slot < work.num_slots:
        raise ValueError(f"slot must be in 0 .. {work.num_slots - 1}, got {slot}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be at least 0, got {max_tokens}")
    shape, head_dim = (state.num_kv_heads, max_tokens), state.layout.head_dim
    key = torch.empty(*shape, head_dim, dtype=state.dtype, device=work.device)
    value = torch.empty(*shape, head_dim, dtype=state.dtype, device=work.device)
    positions = torch.empty(shape, dtype=torch.int32, device=work.device)
    tiers = torch.empty(shape, dtype=torch.int8, device=work.device)
    block = tile_vectors(head_dim)
    if max_tokens:
        _gather_kernel[(triton.cdiv(max_tokens, block), state.num_kv_heads)](
            state.pages, state.page_table, state.num_tokens, key, value, positions, tiers,
            slot, layer, max_tokens,
            L=state.num_layers, H=state.num_kv_heads, M=state.table_width,
            D=head_dim, D_PADDED=triton.next_power_of_2(head_dim),
            PAGE=state.layout.page_bytes, TIERS=work.tiers, B=block, enable_fp_fusion=False,
        )  # fmt: skip
    return key, value, positions, tiers
