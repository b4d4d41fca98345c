"""What a pool holds, read straight from its bytes: an account of a page that is not the reference's."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkv import reference
from diffkv.reference.pages import page_ids
from diffkv.state import PoolState


@dataclass(frozen=True)
class Head:
    """The n tokens that one head keeps, high ones first.

    Attributes:
        key: [n, head_dim] float64, as stored: less the centre.
        value: likewise.
        centre: [n, head_dim] float64, their row's.
        sums: [n] float32, significance sums; 0 in a tier that is not tracked.
        positions: [n] int32; -1 likewise.
        tiers: [n] int64.
    """

    key: Tensor
    value: Tensor
    centre: Tensor
    sums: Tensor
    positions: Tensor
    tiers: Tensor


def read_head(state: PoolState, slot: int, layer: int, head: int) -> Head:
    """The tokens of (slot, layer, head)."""
    parts = []
    for number, tier in enumerate(state.layout.tiers):
        num = int(state.num_tokens[slot, layer, head, number])
        token = torch.arange(num)
        ids = page_ids(state, (slot, layer, head), number)
        pages = state.pages[ids[token // tier.tokens_per_page]]
        index = token % tier.tokens_per_page

        def read(start: int, each: int, dtype: torch.dtype, pages=pages, index=index) -> Tensor:
            """[n, each bytes as dtype] of a region."""
            columns = start + index[:, None] * each + torch.arange(each)
            return pages.gather(1, columns).view(dtype)

        fmt, vectors = tier.format, []
        for bits, groups, codes, meta, code_bytes in (
            (fmt.k_bits, fmt.k_groups, tier.k_codes, tier.k_meta, tier.k_code_bytes),
            (fmt.v_bits, fmt.v_groups, tier.v_codes, tier.v_meta, tier.v_code_bytes),
        ):
            code = read(codes, code_bytes, torch.uint8)
            if bits == 16:
                vectors.append(code.view(state.dtype).double())
                continue
            pairs = read(meta, groups * 4, torch.float16).view(num, groups, 2)
            vectors.append(reference.dequantize(code, pairs, bits, torch.float64))
        sums, positions = torch.zeros(num), torch.full((num,), -1, dtype=torch.int32)
        if tier.tracked:
            sums = read(tier.sums, 4, torch.float32)[:, 0]
            positions = read(tier.positions, 4, torch.int32)[:, 0]
        centre = torch.zeros(num, state.layout.head_dim, dtype=torch.float64)
        if state.centre_dim:
            centre += state.centres[slot, layer, head].double()
        parts.append((*vectors, centre, sums, positions, torch.full((num,), number)))
    return Head(*(torch.cat(each) for each in zip(*parts, strict=True)))


def read_request(state: PoolState, slot: int, layer: int, head: int) -> tuple[Head, Tensor]:
    """The n tokens of all rows of a request, the open one's last, and which are in that: [n] bool."""
    rows = [*state.chains[slot, : int(state.chain_lens[slot])].tolist(), slot]
    heads = [read_head(state, row, layer, head) for row in rows]
    fields = zip(*(vars(each).values() for each in heads), strict=True)
    is_open = [torch.full((len(each.tiers),), each is heads[-1]) for each in heads]
    return Head(*map(torch.cat, fields)), torch.cat(is_open)


def pages_of(state: PoolState, slots: list[int]) -> Tensor:
    """Which pages some rows hold: [num_pages] bool."""
    held = torch.zeros(state.num_pages, dtype=torch.bool)
    rows = itertools.product(slots, range(state.num_layers), range(state.num_kv_heads))
    for row, tier in itertools.product(rows, range(len(state.layout.tiers))):
        held[page_ids(state, row, tier)] = True
    return held


def sum_bytes(state: PoolState) -> Tensor:
    """Which bytes of a page are sums, in one tier or the other: [page_bytes] bool."""
    mask = torch.zeros(state.layout.page_bytes, dtype=torch.bool)
    for tier in state.layout.tiers:
        if tier.tracked:
            mask[tier.sums : tier.sums + tier.tokens_per_page * 4] = True
    return mask
