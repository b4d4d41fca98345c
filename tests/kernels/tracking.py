"""The same requests on pools with and without sums that no decision reads: nothing else may differ."""

import torch
from backends import Backend, ints
from make import make_state, make_sums, make_tiers, make_tokens
from torch import Tensor

from diffkv.pool import check_invariants
from diffkv.state import PoolState

GROUP, SLOTS = 2, (0, 2)
ALPHA_HIGH = 3.0


def _store(ops: Backend, pools: list[PoolState], slot: int, num: int) -> None:
    """A prompt of random tiers, some of its tokens dropped, as a policy may do."""
    state = pools[0]
    for layer in range(state.num_layers):
        tokens = make_tokens(state, [slot], [num])
        tiers, sums = make_tiers(state, num), make_sums(state, num)
        tiers[:, -state.window :] = 0
        for each in pools:
            ops.store_prompt(each, layer, tokens, tiers, sums)
    for each in pools:
        each.thresholds[slot, 0], each.thresholds[slot, 1] = ALPHA_HIGH, 0.0
        each.prompt_lens[slot] = num


def _decode(
    ops: Backend, pools: list[PoolState], slots: list[int], lens: list[int]
) -> list[list[Tensor]]:
    """One step of all layers; outputs by pool and layer."""
    state = pools[0]
    heads, head_dim = state.num_kv_heads, state.layout.head_dim
    rows = ints(*slots)
    outputs: list[list[Tensor]] = [[] for _ in pools]
    plans = [ops.plan_decode(each, rows, ints(*lens)) for each in pools]
    for layer in range(state.num_layers):
        key, value = torch.randn(2, len(slots), heads, head_dim).to(state.dtype)
        # Queries like few keys make means that differ, so that some tokens are demoted
        query = 2 * torch.randn(len(slots), heads * GROUP, head_dim).to(state.dtype)
        for each, plan, out in zip(pools, plans, outputs, strict=True):
            ops.append(each, layer, plan, key, value)
            out.append(torch.empty_like(query))
            ops.attend(each, layer, rows, query, head_dim**-0.5, out[-1])
    return outputs


def _assert_alike(ops: Backend, state: PoolState, tracked: PoolState, slots: list[int]) -> None:
    assert torch.equal(state.num_tokens, tracked.num_tokens)
    most = max(1, int(state.num_tokens.sum(-1).max()))
    for slot in slots:
        for layer in range(state.num_layers):
            key, value, positions, tiers = ops.gather(state, layer, slot, most)
            wanted = ops.gather(tracked, layer, slot, most)
            assert torch.equal(tiers, wanted[3]), "other tiers"
            assert torch.equal(key, wanted[0]) and torch.equal(value, wanted[1]), "other codes"
            known = torch.zeros_like(tiers, dtype=torch.bool)
            for number, tier in enumerate(state.layout.tiers):
                known |= (tiers == number) & tier.tracked
            assert torch.equal(positions[known], wanted[2][known])
            assert (positions[~known] == -1).all()


def run(ops: Backend, quant: str, head_dim: int, dtype: torch.dtype, steps: int) -> PoolState:
    """Prompts and steps with alpha_low 0 on both; checks each step, returns the one without sums."""
    shape = {"num_layers": 2, "window": 4, "max_tokens": 160}
    pools = [
        ops.place(make_state(quant, head_dim, dtype, drops=drops, **shape))
        for drops in (False, True)
    ]
    state, lens = pools[0], [70, 33]
    for slot, num in zip(SLOTS, lens, strict=True):
        _store(ops, pools, slot, num)
    before = state.num_tokens.clone()
    for step in range(steps):
        if step == steps // 2:  # one request ends, another takes its slot
            for each in pools:
                ops.release(each, ints(*SLOTS[1:]), -1)
            lens[1] = 50 - step
            _store(ops, pools, SLOTS[1], 50)
        rows = [SLOTS[1], -1, SLOTS[0]]
        seq_lens = [lens[1] + step + 1, 1, lens[0] + step + 1]
        outputs = _decode(ops, pools, rows, seq_lens)
        assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True)), "other attention"
        _assert_alike(ops, *pools, list(SLOTS))
        for each in pools:
            check_invariants(each)
    grown = (state.num_tokens - before)[SLOTS[0]]
    assert (grown.sum(-1) == steps).all(), "a token was dropped"
    if state.layout.low is not None:
        assert (grown[..., 1] > 0).any(), "no token was demoted"
    return state
