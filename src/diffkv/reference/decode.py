"""A decode step: plan where new tokens go, write them, attend."""

import math

import torch
from torch import Tensor

from diffkv.policy import HIGH, LOW, decode_action, decode_candidates, num_queries_seen, threshold
from diffkv.reference.pages import (
    centre_of,
    centred,
    enter_page,
    page_id,
    page_view,
    read_token,
    write_token,
)
from diffkv.reference.ring import take
from diffkv.reference.rotate import rotate, rotated
from diffkv.state import DecodePlan, NewTokens, PoolState

__all__ = ["append", "attend", "plan_decode"]


def plan_decode(state: PoolState, slots: Tensor, seq_lens: Tensor) -> DecodePlan:
    """Decide for every head what the new token of its request replaces, and take the pages it needs.

    One decision per head (`policy.decode_action`), one plan for all requests, layers and heads; a head
    takes at most one page. Equal means: the token of the smaller position is the victim. A tier that
    is not tracked has none: alpha_low must be 0 unless the layout drops. Counts and tables already
    include the new token afterwards; `append` must follow for every layer.

    Args:
        state: tables and ring change, and `demotions` counts; too few free pages are counted in
            `overruns`, and places are then -1.
        slots: [R] int32, -1 for a row that is no request.
        seq_lens: [R] int32, tokens of each request with the new one.

    Returns:
        The plan.
    """
    shape = (slots.numel(), state.num_layers, state.num_kv_heads)
    places = torch.full((*shape, 4), -1, dtype=torch.int32, device=slots.device)
    decisions = [
        (r, layer, head, _decide(state, (slot, layer, head), seq_len - 1))
        for r, (slot, seq_len) in enumerate(zip(slots.tolist(), seq_lens.tolist(), strict=True))
        if slot >= 0
        for layer in range(state.num_layers)
        for head in range(state.num_kv_heads)
    ]
    plan = DecodePlan(slots, seq_lens - 1, places)
    wanted = torch.tensor([want for *_, (want, _, _) in decisions], dtype=torch.int64)
    first = take(state, wanted)
    if first is None:
        return plan
    for (r, layer, head, (want, victim, low_place)), ring_index in zip(
        decisions, first.tolist(), strict=True
    ):
        row = (int(slots[r]), layer, head)
        page = int(state.free_ring[ring_index % state.num_pages]) if want else -1
        if victim is None:
            places[r, layer, head, :2] = _grow(state, row, HIGH, page)
            continue
        places[r, layer, head, :2] = torch.tensor(victim)
        state.demotions.add_(low_place is not None)
        if low_place == "new":
            places[r, layer, head, 2:] = _grow(state, row, LOW, page)
        elif low_place is not None:
            places[r, layer, head, 2:] = torch.tensor(low_place)
    return plan


def _tokens(state: PoolState, row: tuple[int, int, int], tier: int) -> list[tuple[int, int]]:
    """(page, index) of every token that (slot, layer, head) keeps in a tier."""
    per_page = state.layout.tiers[tier].tokens_per_page
    return [
        (page_id(state, row, tier, k // per_page), k % per_page)
        for k in range(int(state.num_tokens[(*row, tier)]))
    ]


def _least(
    state: PoolState, row: tuple[int, int, int], tier: int, num_tokens: int
) -> tuple[float, tuple[int, int] | None]:
    """(mean, place) of the candidate with the smallest mean, ties by position."""
    layout = state.layout.tiers[tier]
    if not layout.tracked:
        return math.inf, None
    best: tuple[float, int, tuple[int, int] | None] = (math.inf, 0, None)
    for page, index in _tokens(state, row, tier):
        total = page_view(state, page, layout.sums + index * 4, 1, torch.float32)
        position = page_view(state, page, layout.positions + index * 4, 1, torch.int32)
        if decode_candidates(position, num_tokens, state.window).item():
            seen = num_queries_seen(
                position, torch.tensor(num_tokens), state.prompt_lens[row[0]].cpu()
            )
            mean = float((total / seen.float())[0])
            best = min(best, (mean, int(position[0]), (page, index)), key=lambda b: b[:2])
    return best[0], best[2]


def _decide(
    state: PoolState, row: tuple[int, int, int], num_tokens: int
) -> tuple[int, tuple[int, int] | None, tuple[int, int] | str | None]:
    """(pages wanted, place of the high victim, place in the low tier or "new") of one head."""
    has_low = state.layout.low is not None
    least_high, victim = _least(state, row, HIGH, num_tokens)
    least_low, low_victim = _least(state, row, LOW, num_tokens) if has_low else (math.inf, None)
    alphas = threshold(state.thresholds[row[0]], torch.tensor(max(num_tokens, 1)))
    action = decode_action(least_high, least_low, (float(alphas[0]), float(alphas[1])), has_low)
    if action.drop:
        return 0, victim, None
    if action.demote and action.evict_low:
        return 0, victim, low_victim
    tier = LOW if action.demote else HIGH
    full = int(state.num_tokens[(*row, tier)]) == (
        int(state.num_pages_held[(*row, tier)]) * state.layout.tiers[tier].tokens_per_page
    )
    return int(full), victim if action.demote else None, "new" if action.demote else None


def _grow(state: PoolState, row: tuple[int, int, int], tier: int, page: int) -> Tensor:
    """Count one more token of (slot, layer, head) in a tier, with a new page if one was taken."""
    if page >= 0:
        enter_page(state, row, tier, page)
    head = (*row, tier)
    number, index = divmod(int(state.num_tokens[head]), state.layout.tiers[tier].tokens_per_page)
    state.num_tokens[head] += 1
    return torch.tensor([page_id(state, row, tier, number), index], dtype=torch.int32)


def append(
    state: PoolState,
    layer: int,
    plan: DecodePlan,
    key: Tensor,
    value: Tensor,
    signs: Tensor | None = None,
) -> None:
    """Write each request's new token where the plan says, demoting first what it replaces.

    A demoted token is read from its high place, requantised from there and written to its low place
    with its sum and position. The new token's sum is 0.

    Args:
        state: pages change.
        layer: number of the layer.
        plan: the plan of this step.
        key: [R, num_kv_heads, head_dim], the model's dtype.
        value: likewise.
        signs: rotate them first (`rotate`); None: they are stored as they are.
    """
    if signs is not None:
        key, value = rotated(key, signs), rotated(value, signs)
    places = plan.places[:, layer].tolist()
    for r, slot in enumerate(plan.slots.tolist()):
        for head in range(state.num_kv_heads):
            page, index, low_page, low_index = places[r][head]
            if slot < 0 or page < 0:
                continue
            if low_page >= 0:
                k, v, total, position = read_token(state, HIGH, (page, index), torch.float32)
                write_token(state, LOW, (low_page, low_index), (k, v), (total, position))
            vectors = centred(state, (slot, layer, head), key[r, head]), value[r, head]
            write_token(state, HIGH, (page, index), vectors, (0.0, int(plan.positions[r])))


def attend(
    state: PoolState,
    layer: int,
    slots: Tensor,
    query: Tensor,
    scale: float,
    output: Tensor,
    signs: Tensor | None = None,
    new: NewTokens | None = None,
) -> None:
    """Attention of one query token per request over all its kept tokens, both tiers of all its rows.

    Every kept token of the open row gets the max over the group's query heads of its probability added
    to its sum, in the tiers that are tracked. Closed rows, which may be shared, do not change.

    Args:
        state: the sums in the pages of open rows change.
        layer: number of the layer.
        slots: [R] int32, the open rows; -1 for a row that is no request, whose output is 0.
        query: [R, num_q_heads, head_dim], the model's dtype.
        scale: softmax scale.
        output: [R, num_q_heads, head_dim], the model's dtype, written.
        signs: what is stored is rotated by them (`rotate`): queries are, too, and the output back.
        new: tokens that `append` writes first, of a plan for the same slots.
    """
    if new is not None:
        append(state, layer, new.plan, new.key, new.value, signs)
    if signs is not None:
        query = rotated(query, signs)
    group = query.shape[1] // state.num_kv_heads
    output.zero_()
    for r, slot in enumerate(slots.tolist()):
        for head in range(state.num_kv_heads) if slot >= 0 else ():
            rows = [*state.chains[slot, : int(state.chain_lens[slot])].tolist(), slot]
            heads = slice(head * group, (head + 1) * group)
            read = [_read_row(state, (row, layer, head)) for row in rows]
            k, v = (torch.cat([vectors[i] for vectors in read]) for i in range(2))
            if not len(k):
                continue
            probs = ((query[r, heads].float() @ k.T) * scale).softmax(-1)  # [group, kept tokens]
            output[r, heads] = (probs @ v).to(output.dtype)
            _add_sums(state, (slot, layer, head), probs.amax(0))
    if signs is not None:
        rotate(output, signs, True, output)


def _read_row(state: PoolState, row: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Keys and values that (slot, layer, head) keeps: [n, head_dim] float32 each."""
    read = [
        read_token(state, tier, place, torch.float32)
        for tier in range(len(state.layout.tiers))
        for place in _tokens(state, row, tier)
    ]
    none = torch.zeros(0, state.layout.head_dim)
    if not read:
        return none, none
    centre = centre_of(state, row)
    return torch.stack([token[0] + centre for token in read]), torch.stack([t[1] for t in read])


def _add_sums(state: PoolState, row: tuple[int, int, int], probs: Tensor) -> None:
    """Add the last ones of some probabilities to the sums of the tokens of (slot, layer, head)."""
    places = [
        (layout, place)
        for tier, layout in enumerate(state.layout.tiers)
        for place in _tokens(state, row, tier)
    ]
    for (layout, (page, index)), p in zip(places, probs[len(probs) - len(places) :], strict=True):
        if layout.tracked:
            page_view(state, page, layout.sums + index * 4, 1, torch.float32)[0] += p
