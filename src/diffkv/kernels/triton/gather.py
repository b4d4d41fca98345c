"""Read the tokens of a request back from pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_index
from diffkv.kernels.triton.codes import (
    code_pointers,
    load_elements,
    meta_pointers,
    position_pointers,
    rounded,
)
from diffkv.kernels.triton.constants import tile_vectors
from diffkv.kernels.triton.table import page_where, table_of
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
def _places(
    number, mask, pages_ptr, table,
    TIER: tl.constexpr, T: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """(page pointer, index in the page) of tokens `number` of a tier."""
    page = page_where(table, number // T.tokens, mask, TIER, TABLE)
    return pages_ptr + page.to(tl.int64) * PAGE, number % T.tokens


@triton.jit
def _read_side(
    x, number, mask, element, pages_ptr, table,
    KEY: tl.constexpr, TIER: tl.constexpr, TIERS: tl.constexpr, TABLE: tl.constexpr,
    PAGE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """x [B, D_PADDED], with keys or values of tokens `number` of a tier where the mask says."""
    T: tl.constexpr = TIERS[TIER]
    S: tl.constexpr = T.k if KEY else T.v
    page_ptr, index = _places(number, mask, pages_ptr, table, TIER, T, TABLE, PAGE)
    return _load_side(x, page_ptr, index, element, mask, S, DTYPE)


@triton.jit
def _read_positions(
    position, number, mask, pages_ptr, table,
    TIER: tl.constexpr, TIERS: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Position [B], with those of tokens `number` of a tier where the mask says, if it is tracked."""
    T: tl.constexpr = TIERS[TIER]
    if T.tracked:
        page_ptr, index = _places(number, mask, pages_ptr, table, TIER, T, TABLE, PAGE)
        at = position_pointers(page_ptr, index, T)
        position = tl.where(mask, tl.load(at, mask=mask, other=-1), position)
    return position


@triton.jit(do_not_specialize=["slot", "layer", "N"])
def _gather_kernel(
    pages_ptr,  # [num_pages, PAGE]
    leaves_ptr,  # [num_leaves, E]
    directory_ptr,  # [S, L, H, W]
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
    TABLE: tl.constexpr,
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
    tier = tl.where(exists, tier, _DROPPED)
    number = tl.where(tier == 1, i - high, i)
    table = table_of(leaves_ptr, directory_ptr, row, TABLE)
    out = head * N + i
    element = tl.arange(0, D_PADDED)[None, :]
    at = out[:, None] * D + element
    in_vector = exists[:, None] & (element < D)
    key = tl.zeros([B, D_PADDED], tl.float32)
    value = tl.zeros([B, D_PADDED], tl.float32)
    position = tl.full([B], -1, tl.int32)
    # One side after the other: both at once do not fit registers
    for t in tl.static_range(NUM_TIERS):
        key = _read_side(
            key, number, tier == t, element, pages_ptr, table, True, t, TIERS, TABLE, PAGE, DTYPE
        )
    tl.store(key_ptr + at, rounded(key, DTYPE), mask=in_vector)
    for t in tl.static_range(NUM_TIERS):
        value = _read_side(
            value, number, tier == t, element, pages_ptr, table, False, t, TIERS, TABLE, PAGE, DTYPE
        )
    tl.store(value_ptr + at, rounded(value, DTYPE), mask=in_vector)
    for t in tl.static_range(NUM_TIERS):
        position = _read_positions(
            position, number, tier == t, pages_ptr, table, t, TIERS, TABLE, PAGE
        )
    tl.store(positions_ptr + out, position, mask=exists)
    tl.store(tiers_ptr + out, tier.to(tl.int8), mask=exists)


def gather(
    state: PoolState, layer: int, slot: int, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same contract as `reference.gather`."""
    work = workspace(state)
    check_index("layer", layer, state.num_layers)
    check_index("slot", slot, state.num_slots)
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
            state.pages, state.leaves, state.directory, state.num_tokens, key, value, positions, tiers,
            slot, layer, max_tokens,
            L=state.num_layers, H=state.num_kv_heads, TABLE=work.table,
            D=head_dim, D_PADDED=triton.next_power_of_2(head_dim),
            PAGE=state.layout.page_bytes, TIERS=work.tiers, B=block, enable_fp_fusion=False,
        )  # fmt: skip
    return key, value, positions, tiers
