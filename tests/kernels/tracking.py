"""The same requests on pools with and without sums that no decision reads: nothing else may differ."""

import itertools

import torch
from backends import Backend, gather, ints, on_cpu
from contents import read_head
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
        tokens = make_tokens(state, [slot], [num], layer=layer)
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


def _assert_alike(state: PoolState, tracked: PoolState) -> None:
    """Both keep the same codes of the same tokens, and the positions that either knows agree."""
    assert torch.equal(state.num_tokens, tracked.num_tokens)
    is_tracked = torch.tensor([tier.tracked for tier in state.layout.tiers])
    for row in itertools.product(SLOTS, range(state.num_layers), range(state.num_kv_heads)):
        got, wanted = read_head(state, *row), read_head(tracked, *row)
        assert torch.equal(got.tiers, wanted.tiers), "other tiers"
        assert torch.equal(got.key, wanted.key) and torch.equal(got.value, wanted.value)
        known = is_tracked[got.tiers]
        assert torch.equal(got.positions[known], wanted.positions[known])


def _assert_gathered_alike(ops: Backend, state: PoolState, tracked: PoolState) -> None:
    """Likewise of what `gather` reads back."""
    lens = [int(state.num_tokens[slot].sum(-1).max()) for slot in SLOTS]
    read = (gather(ops, each, 0, list(SLOTS), lens) for each in (state, tracked))
    assert all(torch.equal(*each) for each in zip(*read, strict=True))


def run(ops: Backend, quant: str, head_dim: int, dtype: torch.dtype, steps: int) -> PoolState:
    """Prompts and steps with alpha_low 0 on both; checks each step, returns the one without sums."""
    num_layers = 1 if ops.is_slow else 2
    shape = {"num_layers": num_layers, "window": 4, "max_tokens": 160}
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
        _assert_alike(*map(on_cpu, pools))
        for each in pools:
            check_invariants(each)
    _assert_gathered_alike(ops, *pools)
    grown = (state.num_tokens - before)[SLOTS[0]]
    assert (grown.sum(-1) == steps).all(), "a token was dropped"
    if state.layout.low is not None:
        assert (grown[..., 1] > 0).any(), "no token was demoted"
    return state
