"""Small random pools and requests for tests of the operations."""

import dataclasses

import torch
from torch import Tensor

from diffkv import pool
from diffkv.layout import PageLayout
from diffkv.policy import DROPPED
from diffkv.quant import QuantConfig
from diffkv.shape import PoolShape
from diffkv.state import TENSORS, PoolState, PromptTokens

FORMATS = ("k8v8", "k8v4", "k8v4g1x2", "k8v2", "k4v4", "k4v2", "k4v2g2x4", "k4v1")
"""The formats of the original system."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_state(
    quant: str,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    num_layers: int = 1,
    num_kv_heads: int = 2,
    num_slots: int = 3,
    max_tokens: int = 256,
    num_pages: int | None = None,
    window: int = 8,
    page_bytes: int | None = None,
    drops: bool = True,
    leaf_entries: int = 4,
    segment: int = 0,
    centres: float = 1.0,
) -> PoolState:
    """An empty pool with room for `max_tokens` in every slot, its free pages and leaves shuffled.

    Requests can have closed rows where `segment` is not 0. Centres are random, `centres` times as far
    apart as keys are.
    """
    config = QuantConfig.parse(quant)
    layout = PageLayout.derive(config, head_dim, page_bytes, dtype.itemsize, drops)
    heads = (num_layers, num_kv_heads)
    if num_pages is None:
        most = max(layout.max_pages(max_tokens), layout.exact().max_pages(max_tokens))
        num_pages = num_slots * num_layers * num_kv_heads * most
    shape = PoolShape(layout, *heads, num_slots, max_tokens, num_pages, leaf_entries, segment)
    buffer = torch.zeros(shape.table_bytes + num_pages * layout.page_bytes, dtype=torch.uint8)
    state = pool.create(shape, buffer, dtype, window)
    generator = torch.Generator().manual_seed(num_pages)
    for ring in (state.free_ring, state.free_leaves):
        ring.copy_(torch.randperm(len(ring), generator=generator))
    state.centres.copy_(centres * torch.randn(state.centres.shape, generator=generator))
    return state


def set_chain(state: PoolState, slot: int, rows: list[int]) -> None:
    """Let some closed rows stand before an open one."""
    state.chains[slot, : len(rows)] = torch.tensor(rows, dtype=torch.int32)
    state.chain_lens[slot] = len(rows)


def copy_of(state: PoolState) -> PoolState:
    """A state with the same contents in other memory."""
    return dataclasses.replace(state, **{name: getattr(state, name).clone() for name in TENSORS})


def assert_same(state: PoolState, expected: PoolState) -> None:
    """All tables and every byte of every page agree."""
    for name in TENSORS:
        got, want = getattr(state, name), getattr(expected, name)
        assert torch.equal(got, want), f"{name}: {got} is not {want}"


def make_tokens(
    state: PoolState,
    slots: list[int],
    lens: list[int],
    starts: list[int] | None = None,
    layer: int = 0,
) -> PromptTokens:
    """Random tokens for slots; positions begin at `starts`, and keys lie around their row's centre."""
    heads, head_dim, num = state.num_kv_heads, state.layout.head_dim, sum(lens)
    starts = starts or [0] * len(lens)
    key = torch.randn(num, heads, head_dim)
    if state.centre_dim:
        key += state.centres[:, layer].cpu()[slots].float().repeat_interleave(torch.tensor(lens), 0)
    return PromptTokens(
        torch.tensor(slots, dtype=torch.int32),
        torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32),
        key.to(state.dtype),
        torch.randn(num, heads, head_dim).to(state.dtype),
        torch.cat(
            [torch.arange(s, s + n, dtype=torch.int32) for s, n in zip(starts, lens, strict=True)]
        ),
    )


def make_tiers(state: PoolState, num: int, high: float = 0.4, dropped: float = 0.2) -> Tensor:
    """Random tiers: a share of high ones, of dropped ones, the others low if there is such a tier."""
    chance = torch.rand(state.num_kv_heads, num)
    tiers = torch.full(chance.shape, len(state.layout.tiers) - 1, dtype=torch.int8)
    tiers[chance < high + dropped] = 0
    tiers[chance < dropped] = DROPPED
    return tiers


def make_sums(state: PoolState, num: int) -> Tensor:
    """Random significance sums, a few of them equal."""
    return (torch.rand(state.num_kv_heads, num) * 50).round() / 50


def fill(ops, state: PoolState, lens: list[int], high: float = 0.4, dropped: float = 0.2) -> None:
    """Store random tokens into all layers: slot i gets lens[i] tokens."""
    slots = list(range(len(lens)))
    for layer in range(state.num_layers):
        tokens = make_tokens(state, slots, lens, layer=layer)
        num = sum(lens)
        tiers, sums = make_tiers(state, num, high, dropped), make_sums(state, num)
        ops.store_prompt(state, layer, tokens, tiers, sums)
