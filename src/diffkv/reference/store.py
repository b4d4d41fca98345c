"""Store prompt tokens into pages, read them back, and release them."""

import torch
from torch import Tensor

from diffkv.policy import DROPPED, HIGH, LOW
from diffkv.reference.pages import (
    centre_of,
    centred,
    directory_column,
    enter_page,
    page_id,
    page_ids,
    read_token,
    write_token,
)
from diffkv.reference.ring import give_back, give_back_leaves, take
from diffkv.state import PoolState, PromptTokens

__all__ = ["gather", "release", "store_prompt"]


def store_prompt(
    state: PoolState, layer: int, tokens: PromptTokens, tiers: Tensor, sums: Tensor
) -> None:
    """Append tokens to the pages of their slots, each to the tier that was chosen for it.

    Keys are stored as their difference, in float32, from the centre of their row, where it has one.
    Pages are taken as needed, exactly: one plan for all heads of all requests, in the order (request,
    head, tier). Within a tier tokens keep their order. A slot of -1 is skipped. Too few free pages:
    counted in `overruns`, and nothing is stored.

    Args:
        state: pages, tables and ring change.
        layer: number of the layer.
        tokens: tokens of R requests, packed.
        tiers: [num_kv_heads, N] int8 of HIGH, LOW and DROPPED.
        sums: [num_kv_heads, N] float32, significance sums that travel with their tokens.
            They, and positions, are not kept for tiers that are not tracked.
    """
    num_tiers = len(state.layout.tiers)
    slots, starts = tokens.slots.tolist(), tokens.cu_seqlens.tolist()
    requests = [
        (slot, slice(starts[r], starts[r + 1])) for r, slot in enumerate(slots) if slot >= 0
    ]
    wanted = torch.zeros(len(requests), state.num_kv_heads, 2, dtype=torch.int64)
    for r, (slot, span) in enumerate(requests):
        for tier in range(num_tiers):
            after = state.num_tokens[slot, layer, :, tier] + (tiers[:, span] == tier).sum(1)
            per_page = state.layout.tiers[tier].tokens_per_page
            wanted[r, :, tier] = -(-after // per_page) - state.num_pages_held[slot, layer, :, tier]
    first = take(state, wanted)
    if first is None:
        return
    for r, (slot, span) in enumerate(requests):
        for head in range(state.num_kv_heads):
            for tier in range(num_tiers):
                for k in range(int(wanted[r, head, tier])):
                    page = state.free_ring[(int(first[r, head, tier]) + k) % state.num_pages]
                    enter_page(state, (slot, layer, head), tier, int(page))
            for i in range(span.start, span.stop):
                tier = int(tiers[head, i])
                if tier != DROPPED:
                    place = _next_place(state, (slot, layer, head, tier))
                    vectors = (
                        centred(state, (slot, layer, head), tokens.key[i, head]),
                        tokens.value[i, head],
                    )
                    score = float(sums[head, i]), int(tokens.positions[i])
                    write_token(state, tier, place, vectors, score)


def _next_place(state: PoolState, head: tuple[int, int, int, int]) -> tuple[int, int]:
    """Where the next token of (slot, layer, head, tier) goes; counts it."""
    *row, tier = head
    number, index = divmod(int(state.num_tokens[head]), state.layout.tiers[tier].tokens_per_page)
    state.num_tokens[head] += 1
    return page_id(state, (row[0], row[1], row[2]), tier, number), index


def gather(
    state: PoolState,
    layer: int,
    slots: Tensor,
    starts: Tensor,
    key: Tensor,
    value: Tensor,
    tiers: Tensor,
) -> None:
    """Read back the tokens that some rows keep in one layer: of each, high ones first, in page order.

    Centres are added in float32. A row's place may be longer than what a head keeps: what follows is 0.

    Args:
        state: not modified.
        layer: number of the layer.
        slots: [C] int32, the rows; none is -1.
        starts: [C] int32, where the place of each row's tokens begins: it ends where the next one's
            begins, and the last one at N. In order, none shorter than any head keeps.
        key: [N, num_kv_heads, head_dim], the model's dtype, written from the first place on.
        value: likewise.
        tiers: [num_kv_heads, N] int8, written: HIGH or LOW, and DROPPED past a head's last token.
    """
    ends = [*starts.tolist(), len(key)][1:]
    for slot, start, end in zip(slots.tolist(), starts.tolist(), ends, strict=True):
        key[start:end], value[start:end], tiers[:, start:end] = 0, 0, DROPPED
        for head in range(state.num_kv_heads):
            n = start
            for tier in (HIGH, LOW)[: len(state.layout.tiers)]:
                per_page = state.layout.tiers[tier].tokens_per_page
                for k in range(int(state.num_tokens[slot, layer, head, tier])):
                    place = page_id(state, (slot, layer, head), tier, k // per_page), k % per_page
                    k_vector, v_vector, _, _ = read_token(state, tier, place, torch.float32)
                    k_vector = k_vector + centre_of(state, (slot, layer, head))
                    key[n, head], value[n, head] = k_vector.to(key.dtype), v_vector.to(key.dtype)
                    tiers[head, n] = tier
                    n += 1


def release(state: PoolState, slots: Tensor, layer: int) -> None:
    """Give all pages and leaves of some requests back, in the order (slot, layer, head, tier).

    Args:
        state: rings and tables change; counts become 0 and entries of the directory -1.
        slots: [R] int32; -1 is skipped, none may occur twice.
        layer: number of the layer, or -1 for all of them.
    """
    layers = range(state.num_layers) if layer < 0 else (layer,)
    for slot in (s for s in slots.tolist() if s >= 0):
        for each in layers:
            for head in range(state.num_kv_heads):
                for tier in range(2):
                    _release_tier(state, (slot, each, head), tier)
        state.num_tokens[slot, list(layers)] = 0
        state.num_pages_held[slot, list(layers)] = 0


def _release_tier(state: PoolState, row: tuple[int, int, int], tier: int) -> None:
    pages = page_ids(state, row, tier)
    give_back(state, pages)
    leaves = -(-len(pages) // state.leaf_entries)
    columns = directory_column(state, tier, torch.arange(leaves, device=pages.device))
    give_back_leaves(state, state.directory[(*row, columns)])
    state.directory[(*row, columns)] = -1
