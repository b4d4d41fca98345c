"""plan_decode and append do, step by step, exactly what the reference does."""

import dataclasses

import pytest
import torch
from make import DTYPES, assert_same, copy_of, fill, make_state, make_tiers, make_tokens

from diffkv import reference
from diffkv.kernels import cpu
from diffkv.policy import LOW
from diffkv.pool import check_invariants
from diffkv.reference.pages import page_ids
from diffkv.state import PoolState


def set_requests(state: PoolState, alphas: list[tuple[float, float]], lens: list[int]) -> None:
    """Thresholds and prompt lengths of the first slots."""
    state.thresholds[: len(alphas)] = torch.tensor(alphas)
    state.prompt_lens[: len(lens)] = torch.tensor(lens, dtype=torch.int32)


def add_random_sums(state: PoolState) -> None:
    """What attention does to the sums of all kept tokens, at random and with ties."""
    for tier, layout in enumerate(state.layout.tiers):
        for slot, layer, head in torch.cartesian_prod(
            *(torch.arange(n) for n in state.directory.shape[:3])
        ).tolist():
            left = int(state.num_tokens[slot, layer, head, tier])
            for id in page_ids(state, (slot, layer, head), tier).tolist():
                page = state.pages[id]
                num = min(left, layout.tokens_per_page)
                sums = page[layout.sums : layout.sums + num * 4].view(torch.float32)
                sums += (torch.rand(num) * 4).round() / 32
                left -= num


def step_both(state, expected, slots, seq_lens):
    """One decode step of all layers, in both, with the same tokens."""
    plan = cpu.plan_decode(state, slots, seq_lens)
    expected_plan = reference.plan_decode(expected, slots, seq_lens)
    assert torch.equal(plan.places, expected_plan.places)
    assert torch.equal(plan.positions, expected_plan.positions)
    assert plan.slots is slots
    shape = (slots.numel(), state.num_kv_heads, state.layout.head_dim)
    for layer in range(state.num_layers):
        key, value = torch.randn(shape).to(state.dtype), torch.randn(shape).to(state.dtype)
        cpu.append(state, layer, plan, key, value)
        reference.append(expected, layer, expected_plan, key, value)
    assert_same(state, expected)
    return plan


ALPHAS = {
    "none": [(0.0, 0.0), (0.0, 0.0)],
    "low": [(0.5, 0.0), (3.0, 0.2)],
    "both": [(4.0, 1.0), (2.0, 2.0)],
    "all": [(1e6, 0.0), (1e6, 1e6)],
}


@pytest.mark.parametrize("alphas", ALPHAS)
@pytest.mark.parametrize("quant", ["k8v4-k4v2", "k8v8", "k16v16-k4v1g4x2"])
def test_many_steps(quant, alphas):
    state = make_state(quant, num_layers=2, window=6, max_tokens=160)
    lens = [61, 9]
    fill(cpu, state, lens)
    set_requests(state, ALPHAS[alphas], lens)
    expected = copy_of(state)
    slots = torch.tensor([1, -1, 0], dtype=torch.int32)
    seen = torch.zeros(3, dtype=torch.bool)
    for step in range(40):
        plan = step_both(
            state, expected, slots, torch.tensor([10, 1, 62], dtype=torch.int32) + step
        )
        add_random_sums(state)
        expected.pages.copy_(state.pages)
        check_invariants(state)
        seen |= torch.tensor([(plan.places[0, ..., 2] >= 0).any(), False, True])
    if alphas == "none":
        assert (state.num_tokens.sum(-1)[:2, 0].sum() > 0) and not seen[0]
    if alphas == "both" and state.layout.low is not None:
        assert seen[0], "no token was ever demoted"


@pytest.mark.parametrize("dtype", DTYPES)
def test_demotion_in_every_dtype(dtype):
    state = make_state("k16v8-k4v2", 80, dtype, window=2, max_tokens=80)
    fill(cpu, state, [30], high=1.0, dropped=0.0)
    set_requests(state, [(1e6, 0.0)], [30])
    expected = copy_of(state)
    slots = torch.zeros(1, dtype=torch.int32)
    for step in range(12):
        plan = step_both(state, expected, slots, torch.tensor([31 + step], dtype=torch.int32))
        assert (plan.places[..., 2] >= 0).all()
    assert (state.num_tokens[0, 0, :, LOW] == 12).all()


@pytest.mark.parametrize("window", [0, 1, 64])
def test_window(window):
    state = make_state("k8v4-k4v2", window=window, max_tokens=160)
    fill(cpu, state, [70, 30], high=0.7)
    set_requests(state, [(1e6, 1.0), (1e6, 1e6)], [70, 30])
    expected = copy_of(state)
    slots = torch.tensor([0, 1], dtype=torch.int32)
    for step in range(8):
        step_both(state, expected, slots, torch.tensor([71, 31], dtype=torch.int32) + step)


@pytest.mark.parametrize("alphas", [(1e6, 0.0), (1e6, 1e6)])
def test_equal_means_go_by_position(alphas):
    state = make_state("k8v4-k4v2", window=2, max_tokens=160)
    tokens, tiers = make_tokens(state, [0], [90]), make_tiers(state, 90, high=0.5, dropped=0.0)
    positions = tokens.positions.flip(0).contiguous()  # places go against positions
    tokens = dataclasses.replace(tokens, positions=positions)
    cpu.store_prompt(state, 0, tokens, tiers, torch.zeros(2, 90))
    set_requests(state, [alphas], [90])
    expected = copy_of(state)
    slots = torch.zeros(1, dtype=torch.int32)
    for step in range(6):
        plan = step_both(state, expected, slots, torch.tensor([91 + step], dtype=torch.int32))
        assert (plan.places[..., 2] >= 0).all()


def test_from_the_first_token_on():
    state = make_state("k8v4-k4v2", window=3)
    set_requests(state, [(3.0, 0.5)], [0])
    expected = copy_of(state)
    slots = torch.zeros(1, dtype=torch.int32)
    for step in range(20):
        step_both(state, expected, slots, torch.tensor([1 + step], dtype=torch.int32))
        add_random_sums(state)
        expected.pages.copy_(state.pages)


def test_long_request():
    state = make_state("k8v4-k4v2", num_kv_heads=3, max_tokens=1300, num_slots=1, window=64)
    fill(cpu, state, [1200], dropped=0.0)
    set_requests(state, [(2.0, 0.1)], [1100])
    expected = copy_of(state)
    slots = torch.zeros(1, dtype=torch.int32)
    for step in range(3):
        step_both(state, expected, slots, torch.tensor([1201 + step], dtype=torch.int32))


def test_overrun_changes_nothing():
    state = make_state("k8v4", num_pages=4, num_slots=2)
    num = state.layout.high.tokens_per_page
    fill(cpu, state, [num], high=1.0, dropped=0.0)
    fill_second = torch.tensor([1], dtype=torch.int32)
    expected = copy_of(state)
    step_both(state, expected, fill_second, torch.ones(1, dtype=torch.int32))

    plan = step_both(
        state,
        expected,
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([num + 1], dtype=torch.int32),
    )

    assert (plan.places == -1).all()
    assert state.overruns.item() == 1


def test_wrong_tensors_are_refused():
    state = make_state("k8v4")
    slots = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="seq_lens"):
        cpu.plan_decode(state, slots, torch.ones(1, dtype=torch.int64))
    plan = cpu.plan_decode(state, slots, torch.ones(1, dtype=torch.int32))
    key = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="layer"):
        cpu.append(state, 1, plan, key, key)
    with pytest.raises(ValueError, match="value"):
        cpu.append(state, 0, plan, key, key.half())
