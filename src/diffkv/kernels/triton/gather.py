"""Read the tokens of rows back from pages."""

import triton
import triton.language as tl
from torch import Tensor

from diffkv.kernels.check import check_index, check_read
from diffkv.kernels.triton.codes import (
    code_pointers,
    load_elements,
    meta_pointers,
    rounded,
)
from diffkv.kernels.triton.constants import cdiv, power_of_2, tile_vectors
from diffkv.kernels.triton.launch import launch
from diffkv.kernels.triton.order import launch_dependents, wait
from diffkv.kernels.triton.table import centre_of, page_where, table_of
from diffkv.kernels.triton.workspace import workspace
from diffkv.policy import DROPPED
from diffkv.state import PoolState

__all__ = ["gather"]

READ_TILES = 4
"""A program reads so many times as many vectors as one quantises."""

START_BLOCK = 64
"""Rows that a program looks through at a time for those of its places."""

_DROPPED = tl.constexpr(DROPPED)
_NEVER = tl.constexpr(2**31 - 1)


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


@triton.jit(do_not_specialize=["layer", "C", "N"])
def _gather_kernel(
    slots_ptr,  # [C]
    starts_ptr,  # [C]
    pages_ptr,  # [num_pages, PAGE]
    leaves_ptr,  # [num_leaves, E]
    directory_ptr,  # [S, L, H, W]
    num_tokens_ptr,  # [S, L, H, 2]
    centres_ptr,  # [S, L, H, D or 0] bf16
    key_ptr,  # [N, H, D], out
    value_ptr,  # [N, H, D], out
    tiers_ptr,  # [H, N] i8, out
    key_stride,
    value_stride,
    layer,
    C,
    N,
    L: tl.constexpr,
    H: tl.constexpr,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    TIERS: tl.constexpr,
    CENTRED: tl.constexpr,
    STARTS: tl.constexpr,
    B: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per B places of a head: of each row high tokens, then low ones, then none."""
    wait(PDL)
    launch_dependents(PDL)
    NUM_TIERS: tl.constexpr = len(TIERS)
    DTYPE: tl.constexpr = key_ptr.dtype.element_ty
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    head = tl.program_id(1).to(tl.int64)
    begun = tl.zeros([B], tl.int32)
    for first in range(0, C, STARTS):
        each = first + tl.arange(0, STARTS)
        start = tl.load(starts_ptr + each, mask=each < C, other=_NEVER)
        begun += tl.sum((start[None, :] <= place[:, None]).to(tl.int32), 1)
    exists = (place < N) & (begun > 0)
    i = place - tl.load(starts_ptr + begun - 1, mask=exists, other=0)
    slot = tl.load(slots_ptr + begun - 1, mask=exists, other=0).to(tl.int64)
    row = (slot * L + layer) * H + head
    high = tl.load(num_tokens_ptr + row * 2, mask=exists, other=0)
    kept = high
    if NUM_TIERS > 1:
        kept = high + tl.load(num_tokens_ptr + row * 2 + 1, mask=exists, other=0)
    tier = tl.where(i < high, 0, tl.where(i < kept, 1, _DROPPED))
    tier = tl.where(exists, tier, _DROPPED)
    number = tl.where(tier == 1, i - high, i)
    table = table_of(leaves_ptr, directory_ptr, row, TABLE)
    element = tl.arange(0, D_PADDED)[None, :]
    at = head * D + element
    in_vector = exists[:, None] & (element < D)
    key = tl.zeros([B, D_PADDED], tl.float32)
    value = tl.zeros([B, D_PADDED], tl.float32)
    # One side after the other: both at once do not fit registers
    for t in tl.static_range(NUM_TIERS):
        key = _read_side(
            key, number, tier == t, element, pages_ptr, table, True, t, TIERS, TABLE, PAGE, DTYPE
        )
    if CENTRED:
        centre_at = centre_of(centres_ptr, row, TIERS[0].k)
        is_kept = in_vector & (tier != _DROPPED)[:, None]
        key += tl.load(centre_at[:, None] + element, mask=is_kept, other=0.0).to(tl.float32)
    tl.store(key_ptr + (place * key_stride)[:, None] + at, rounded(key, DTYPE), mask=in_vector)
    for t in tl.static_range(NUM_TIERS):
        value = _read_side(
            value, number, tier == t, element, pages_ptr, table, False, t, TIERS, TABLE, PAGE, DTYPE
        )
    tl.store(
        value_ptr + (place * value_stride)[:, None] + at, rounded(value, DTYPE), mask=in_vector
    )
    tl.store(tiers_ptr + head * N + place, tier.to(tl.int8), mask=exists)


def gather(
    state: PoolState,
    layer: int,
    slots: Tensor,
    starts: Tensor,
    key: Tensor,
    value: Tensor,
    tiers: Tensor,
) -> None:
    """Same contract as `reference.gather`. One launch; rows of key and value may be apart."""
    work = workspace(state)
    heads, head_dim = state.num_kv_heads, state.layout.head_dim
    num, num_rows = key.shape[0], slots.numel()
    check_index("layer", layer, state.num_layers)
    key_stride, value_stride = check_read(state, slots, starts, key, value, tiers, work.device)
    if not num or not num_rows:
        return
    block = READ_TILES * tile_vectors(head_dim)
    launch(
        _gather_kernel, (cdiv(num, block), heads),
        slots, starts, state.pages, state.leaves, state.directory, state.num_tokens, state.centres,
        key, value, tiers, key_stride, value_stride, layer, num_rows, num,
        L=state.num_layers, H=heads, TABLE=work.table,
        D=head_dim, D_PADDED=power_of_2(head_dim),
        PAGE=state.layout.page_bytes, TIERS=work.tiers, CENTRED=state.centre_dim > 0,
        STARTS=START_BLOCK, B=block, enable_fp_fusion=False, **work.overlap,
    )  # fmt: skip
