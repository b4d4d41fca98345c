"""Pools full of random tokens, as attention and the pool's own operations find them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

import torch
from torch import Tensor

from diffkv import pool
from diffkv.layout import PageLayout
from diffkv.ops import Ops
from diffkv.policy import HIGH, LOW, WINDOW, fill_pages
from diffkv.quant import QuantConfig
from diffkv.segments import RowEnds
from diffkv.shape import PoolShape
from diffkv.state import PoolState, PromptTokens

__all__ = [
    "TIER_MIXES",
    "Tokens",
    "available_bytes",
    "fill",
    "kept_tokens",
    "make_pool",
    "pack",
    "random_tokens",
    "row_bounds",
]

MEMINFO = Path("/proc/meminfo")

TIER_MIXES = {"high": 1.0, "low": 0.0, "mix": 0.2}
"""Share of the tokens that are high."""


@dataclass(frozen=True)
class Tokens:
    """Keys and values that requests share: request r has the first `lengths[r]` of them.

    Attributes:
        key: [N, num_kv_heads, head_dim], N the longest length.
        value: likewise.
        lengths: tokens of each request.
    """

    key: Tensor
    value: Tensor
    lengths: list[int]


def random_tokens(
    lengths: Sequence[int], num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> Tokens:
    """Normal random keys and values."""
    shape = (max(lengths), num_kv_heads, head_dim)
    key, value = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return Tokens(key, value, list(lengths))


def row_bounds(length: int, segment: int) -> list[int]:
    """Where the rows of a prompt begin, and its end: closed rows, then the open one."""
    return [0, *RowEnds(segment, length).up_to(0, length), length]


def make_pool(
    quant: str,
    head_dim: int,
    dtype: torch.dtype,
    heads: tuple[int, int],
    num_slots: int,
    max_tokens: int,
    device: str = "cpu",
    num_pages: int | None = None,
    segment: int = 0,
) -> PoolState:
    """An empty pool, its free pages in random order.

    Args:
        quant: quantisation configuration.
        head_dim: elements of a head's key.
        dtype: the model's.
        heads: layers, and KV heads of each.
        num_slots: rows: requests, and closed rows where there are any.
        max_tokens: longest request.
        device: "cpu" or "cuda".
        num_pages: pages of the pool; enough for all slots at their longest if None.
        segment: tokens after which rows are closed; 0: none is.
    """
    layout = PageLayout.derive(QuantConfig.parse(quant), head_dim, None, dtype.itemsize)
    if num_pages is None:
        num_pages = num_slots * heads[0] * heads[1] * layout.max_pages(max_tokens)
    shape = PoolShape(layout, *heads, num_slots, max_tokens, num_pages, segment=segment)
    num_bytes = shape.table_bytes + num_pages * layout.page_bytes
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    state = pool.create(shape, buffer, dtype, WINDOW)
    state.free_ring.copy_(torch.randperm(num_pages))
    state.free_leaves.copy_(torch.randperm(len(state.free_leaves)))
    return state


def pack(tokens: Tokens, slot: int, start: int, end: int) -> PromptTokens:
    """Some tokens of a request, as a row of its own."""
    device = tokens.key.device
    positions = torch.arange(start, end, dtype=torch.int32, device=device)
    slots, starts = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([slot], [0, end - start])
    )
    return PromptTokens(slots, starts, tokens.key[start:end], tokens.value[start:end], positions)


def fill(
    state: PoolState,
    ops: Ops,
    tokens: Tokens,
    high_share: float,
    ragged_heads: bool = False,
    segment: int = 0,
    closed: bool = False,
) -> None:
    """Store all requests' tokens in every layer, tiers at random; each row's window is high.

    Args:
        state: an empty pool.
        ops: operations of its device.
        tokens: tokens of the requests; slot r holds the r-th, or the open row of it. Closed rows are in
            the slots after those.
        high_share: share of high tokens outside the window; the others are low, if there is such a tier.
        ragged_heads: let the share grow from head to head, from none to twice `high_share`.
        segment: tokens after which rows are closed; 0: none is.
        closed: requests are closed rows themselves.
    """
    heads, device = state.num_kv_heads, state.pages.device.type
    share = torch.full((heads, 1), high_share, device=device)
    if ragged_heads:
        share = share * torch.linspace(0, 2, heads, device=device)[:, None]
    free = count(len(tokens.lengths))
    for slot, length in enumerate(tokens.lengths):
        state.prompt_lens[slot] = length
        bounds = row_bounds(length, segment)
        chain = [next(free) for _ in bounds[2:]]
        for row, (start, end) in zip([*chain, slot], pairwise(bounds), strict=True):
            _fill_row(state, ops, pack(tokens, row, start, end), share, closed or row != slot)
        if chain:
            state.chains[slot, : len(chain)] = torch.tensor(chain, dtype=torch.int32)
            state.chain_lens[slot] = len(chain)


def _fill_row(
    state: PoolState, ops: Ops, row: PromptTokens, share: Tensor, is_closed: bool
) -> None:
    """Store a row; high pages of closed ones are full."""
    length, device = row.key.shape[0], row.key.device
    chance = torch.rand(state.num_kv_heads, length, device=device)
    is_high = (chance < share) | (torch.arange(length, device=device) >= length - state.window)
    if len(state.layout.tiers) == 1:
        is_high = torch.ones_like(is_high)
    tiers = torch.where(is_high, HIGH, LOW).to(torch.int8)
    sums = torch.rand(tiers.shape, device=device)
    if is_closed and state.layout.low is not None:
        fill_pages(tiers, sums, state.layout.high.tokens_per_page)
    for layer in range(state.num_layers):
        ops.store_prompt(state, layer, row, tiers, sums)


def kept_tokens(state: PoolState, layer: int) -> list[int]:
    """How many tokens all requests keep in a layer, all heads, by tier."""
    kept: list[int] = state.num_tokens[:, layer].sum((0, 1)).tolist()
    return kept[: len(state.layout.tiers)]


def available_bytes(device: str) -> int:
    """Bytes of memory that are free; 4 GiB where a host does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 4 << 30
