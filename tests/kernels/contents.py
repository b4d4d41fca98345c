"""What a pool holds, read straight from its bytes: an account of a page that is not the reference's."""

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
        key: [n, head_dim] float64.
        value: likewise.
        sums: [n] float32, significance sums; 0 in a tier that is not tracked.
        tiers: [n] int64.
    """

    key: Tensor
    value: Tensor
    sums: Tensor
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
            """[n, each bytes as dtype] of a segment."""
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
        sums = read(tier.sums, 4, torch.float32)[:, 0] if tier.tracked else torch.zeros(num)
        parts.append((*vectors, sums, torch.full((num,), number)))
    return Head(*(torch.cat(each) for each in zip(*parts, strict=True)))


def sum_bytes(state: PoolState) -> Tensor:
    """Which bytes of a page are sums, in one tier or the other: [page_bytes] bool."""
    mask = torch.zeros(state.layout.page_bytes, dtype=torch.bool)
    for tier in state.layout.tiers:
        if tier.tracked:
            mask[tier.sums : tier.sums + tier.tokens_per_page * 4] = True
    return mask
