"""Find a head's pages, and read and write single tokens of a page."""

from typing import TypeVar

import torch
from torch import Tensor

from diffkv.reference.quantize import dequantize, quantize
from diffkv.reference.ring import take_leaf
from diffkv.state import PoolState
from diffkv.tier import TierLayout

__all__ = [
    "centre_of",
    "centred",
    "directory_column",
    "enter_page",
    "page_id",
    "page_ids",
    "page_view",
    "read_token",
    "write_token",
]

Number = TypeVar("Number", int, Tensor)


def page_view(state: PoolState, page: int, start: int, num: int, dtype: torch.dtype) -> Tensor:
    """A view of `num` elements of `dtype` that start at byte `start` of a page."""
    row = state.pages[page]
    return row[start : start + num * dtype.itemsize].view(dtype)


def directory_column(state: PoolState, tier: int, leaf: Number) -> Number:
    """Where leaf number `leaf`, or several, of a head and tier is in its row of the directory."""
    return leaf if tier == 0 else state.directory_width - 1 - leaf


def page_id(state: PoolState, row: tuple[int, int, int], tier: int, number: int) -> int:
    """The page number `number` that (slot, layer, head) holds in a tier."""
    leaf, entry = divmod(number, state.leaf_entries)
    return int(state.leaves[state.directory[(*row, directory_column(state, tier, leaf))], entry])


def page_ids(state: PoolState, row: tuple[int, int, int], tier: int) -> Tensor:
    """The pages that (slot, layer, head) holds in a tier, first to last: [n] int64."""
    number = torch.arange(int(state.num_pages_held[(*row, tier)]), device=state.leaves.device)
    columns = directory_column(state, tier, number // state.leaf_entries)
    return state.leaves[state.directory[row][columns].long(), number % state.leaf_entries].long()


def centre_of(state: PoolState, row: tuple[int, int, int]) -> Tensor:
    """[head_dim] float32: what was subtracted from the keys of (slot, layer, head)."""
    if state.centre_dim:
        return state.centres[row].float()
    return torch.zeros(state.layout.head_dim, device=state.centres.device)


def centred(state: PoolState, row: tuple[int, int, int], key: Tensor) -> Tensor:
    """A key of (slot, layer, head) less the centre in float32; where there is none, as it is."""
    return key.float() - centre_of(state, row) if state.centre_dim else key


def enter_page(state: PoolState, row: tuple[int, int, int], tier: int, page: int) -> None:
    """Enter a page that was taken as the last one of (slot, layer, head) in a tier.

    The first page of a leaf takes the leaf too.
    """
    held = int(state.num_pages_held[(*row, tier)])
    leaf, entry = divmod(held, state.leaf_entries)
    column = directory_column(state, tier, leaf)
    if entry == 0:
        state.directory[(*row, column)] = take_leaf(state)
    state.leaves[state.directory[(*row, column)], entry] = page
    state.num_pages_held[(*row, tier)] = held + 1


def _vector(
    state: PoolState, page: int, index: int, codes: int, meta: int, code_bytes: int, groups: int
) -> tuple[Tensor, Tensor]:
    code = page_view(state, page, codes + index * code_bytes, code_bytes, torch.uint8)
    start = meta + index * groups * 4
    return code, page_view(state, page, start, groups * 2, torch.float16)


def _parts(tier: TierLayout) -> tuple[tuple[int, int, int, int, int], ...]:
    """(bits, groups, codes offset, meta offset, code bytes) of K and of V; no groups for 16 bits."""
    fmt = tier.format
    k_groups = 0 if fmt.k_bits == 16 else fmt.k_groups
    v_groups = 0 if fmt.v_bits == 16 else fmt.v_groups
    return (
        (fmt.k_bits, k_groups, tier.k_codes, tier.k_meta, tier.k_code_bytes),
        (fmt.v_bits, v_groups, tier.v_codes, tier.v_meta, tier.v_code_bytes),
    )


def write_token(
    state: PoolState,
    tier: int,
    place: tuple[int, int],
    vectors: tuple[Tensor, Tensor],
    score: tuple[float, int],
) -> None:
    """Write one token of one head into a page.

    Args:
        state: `pages` changes.
        tier: HIGH or LOW.
        place: (page, index in the page).
        vectors: (key, value), [head_dim] each; quantised from the dtype they come in.
        score: (significance sum, position); a tier that is not tracked has no place for it.
    """
    page, index = place
    layout = state.layout.tiers[tier]
    for x, (bits, groups, codes_at, meta_at, code_bytes) in zip(
        vectors, _parts(layout), strict=True
    ):
        stored = x.to(state.dtype) if bits == 16 else x
        codes, meta = quantize(stored[None], bits, max(groups, 1))
        code_place, meta_place = _vector(state, page, index, codes_at, meta_at, code_bytes, groups)
        code_place.copy_(codes[0])
        meta_place.copy_(meta.flatten())
    if layout.tracked:
        page_view(state, page, layout.sums + index * 4, 1, torch.float32)[0] = score[0]
        page_view(state, page, layout.positions + index * 4, 1, torch.int32)[0] = score[1]


def read_token(
    state: PoolState, tier: int, place: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, float, int]:
    """Read one token of one head: (key, value, significance sum, position), vectors as `dtype`.

    16-bit formats are read in the model's dtype and then converted. A tier that is not tracked has no
    scores: sum 0, position -1.
    """
    page, index = place
    layout = state.layout.tiers[tier]
    vectors = []
    for bits, groups, codes_at, meta_at, code_bytes in _parts(layout):
        codes, meta = _vector(state, page, index, codes_at, meta_at, code_bytes, groups)
        stored = state.dtype if bits == 16 else dtype
        x = dequantize(codes[None], meta.view(1, groups, 2), bits, stored)
        vectors.append(x[0].to(dtype))
    if not layout.tracked:
        return vectors[0], vectors[1], 0.0, -1
    total = float(page_view(state, page, layout.sums + index * 4, 1, torch.float32)[0])
    position = int(page_view(state, page, layout.positions + index * 4, 1, torch.int32)[0])
    return vectors[0], vectors[1], total, position
