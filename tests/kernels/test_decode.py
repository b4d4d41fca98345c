"""plan_decode and append do, step by step, exactly what the reference does."""

import dataclasses

import pytest
import torch
from backends import Pair, ints
from make import DTYPES, make_state, make_tiers, make_tokens

from diffkv.policy import LOW
from diffkv.pool import check_invariants
from diffkv.reference.pages import page_ids
from diffkv.state import PoolState


def set_requests(state: PoolState, alphas: list[tuple[float, float]], lens: list[int]) -> None:
    """Thresholds and prompt lengths of the first slots."""
    state.thresholds[: len(alphas)] = torch.tensor(alphas)
    state.prompt_lens[: len(lens)] = torch.tensor(lens, dtype=torch.int32)


def start(kernels, state: PoolState, alphas: list[tuple[float, float]], lens: list[int], **shares):
    """Both pools with random requests."""
    kernels.fill(state, lens, **shares)
    set_requests(state, alphas, lens)
    return Pair(kernels, state)


def add_random_sums(pair: Pair) -> None:
    """What attention does to the sums of all kept tokens, at random and with ties."""
    state = pair.expected
    for slot, layer, head in torch.cartesian_prod(
        *(torch.arange(n) for n in state.directory.shape[:3])
    ).tolist():
        for tier, layout in enumerate(state.layout.tiers):
            left = int(state.num_tokens[slot, layer, head, tier])
            for id in page_ids(state, (slot, layer, head), tier).tolist():
                page = state.pages[id]
                num = min(left, layout.tokens_per_page)
                sums = page[layout.sums : layout.sums + num * 4].view(torch.float32)
                sums += (torch.rand(num) * 4).round() / 32
                left -= num
    pair.state.pages.copy_(state.pages)


ALPHAS = {
    "none": [(0.0, 0.0), (0.0, 0.0)],
    "low": [(0.5, 0.0), (3.0, 0.2)],
    "both": [(4.0, 1.0), (2.0, 2.0)],
    "all": [(1e6, 0.0), (1e6, 1e6)],
}


@pytest.mark.parametrize("alphas", ALPHAS)
@pytest.mark.parametrize("quant", ["k8v4-k4v2", "k8v8", "k16v16-k16v8"])
def test_many_steps(kernels, quant, alphas):
    state = make_state(quant, num_layers=2, window=6, max_tokens=160)
    pair = start(kernels, state, ALPHAS[alphas], [61, 9])
    begun = state.num_tokens.sum()
    steps, demoted, grew = (10 if kernels.is_slow else 40), [], []
    for step in range(steps):
        plan = pair.step([1, -1, 0], [10 + step, 1, 62 + step])
        demoted.append(plan.places[[0, 2], ..., 2] >= 0)
        assert (plan.places[1] == -1).all()
        add_random_sums(pair)
        check_invariants(pair.state)
    grew = state.num_tokens.sum() - begun == steps * 8
    if alphas == "none":
        assert grew and not any(each.any() for each in demoted)
    if alphas in ("both", "all") and state.layout.low is not None:
        assert any(each.any() for each in demoted), "no token was ever demoted"
    if alphas == "both":
        assert not grew, "nothing was dropped or evicted"


@pytest.mark.parametrize("dtype", DTYPES)
def test_demotion_in_every_dtype(kernels, dtype):
    state = make_state("k16v8-k4v2", 80, dtype, window=2, max_tokens=80)
    pair = start(kernels, state, [(1e6, 0.0)], [30], high=1.0, dropped=0.0)
    for step in range(12):
        plan = pair.step([0], [31 + step])
        assert (plan.places[..., 2] >= 0).all()
    assert (state.num_tokens[0, 0, :, LOW] == 12).all()


@pytest.mark.parametrize("window", [0, 1, 64])
def test_window(kernels, window):
    state = make_state("k8v4-k4v2", window=window, max_tokens=160)
    pair = start(kernels, state, [(1e6, 1.0), (1e6, 1e6)], [70, 30], high=0.7)
    for step in range(8):
        pair.step([0, 1], [71 + step, 31 + step])


@pytest.mark.parametrize("alphas", [(1e6, 0.0), (1e6, 1e6)])
def test_equal_means_go_by_position(kernels, alphas):
    state = make_state("k8v4-k4v2", window=2, max_tokens=160)
    tokens, tiers = make_tokens(state, [0], [90]), make_tiers(state, 90, high=0.5, dropped=0.0)
    positions = tokens.positions.flip(0).contiguous()  # places go against positions
    tokens = dataclasses.replace(tokens, positions=positions)
    set_requests(state, [alphas], [90])
    pair = Pair(kernels, state)
    pair.both("store_prompt", 0, tokens, tiers, torch.zeros(2, 90))
    for step in range(6):
        plan = pair.step([0], [91 + step])
        assert (plan.places[..., 2] >= 0).all()


def test_from_the_first_token_on(kernels):
    state = make_state("k8v4-k4v2", window=3)
    set_requests(state, [(3.0, 0.5)], [0])
    pair = Pair(kernels, state)
    for step in range(20):
        pair.step([0], [1 + step])
        add_random_sums(pair)


def test_long_request(kernels):
    state = make_state("k8v4-k4v2", num_kv_heads=3, max_tokens=1300, num_slots=1, window=64)
    pair = start(kernels, state, [(2.0, 0.1)], [1200], dropped=0.0)
    state.prompt_lens[0] = pair.state.prompt_lens[0] = 1100
    for step in range(3):
        pair.step([0], [1201 + step])


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_page_boundary(kernels, extra):
    """Steps across the end of a page that was used before, of either tier."""
    state = make_state("k8v4-k4v2", window=2, num_slots=2)
    state.pages.copy_(torch.randint(0, 256, state.pages.shape, dtype=torch.uint8))
    high, low = (tier.tokens_per_page + extra for tier in state.layout.tiers)
    tiers = torch.tensor([0] * high + [1] * low, dtype=torch.int8).expand(2, -1).contiguous()
    set_requests(state, [(0.0, 0.0), (1e6, 0.0)], [high + low] * 2)
    pair = Pair(kernels, state)
    pair.store([0, 1], [high + low] * 2, tiers=tiers.repeat(1, 2))
    for step in range(1, 4):
        pair.step([0, 1], [high + low + step] * 2)
    assert (state.num_tokens[0, 0] == torch.tensor([high + 3, low])).all()
    assert (state.num_tokens[1, 0] == torch.tensor([high, low + 3])).all()


def test_overrun_changes_nothing(kernels):
    state = make_state("k8v4", num_pages=4, num_slots=2)
    num = state.layout.high.tokens_per_page
    pair = start(kernels, state, [], [num], high=1.0, dropped=0.0)
    pair.step([1], [1])
    plan = pair.step([0], [num + 1])
    assert (plan.places == -1).all()
    assert state.overruns.item() == 1


def test_two_heads_want_a_page_and_one_is_free(kernels):
    state = make_state("k8v4", num_pages=3, num_slots=1)
    pair = start(kernels, state, [], [state.layout.high.tokens_per_page], high=1.0, dropped=0.0)
    plan = pair.step([0], [state.layout.high.tokens_per_page + 1])
    assert (plan.places == -1).all()
    assert state.overruns.item() == 1


def test_no_request(kernels):
    pair = Pair(kernels, make_state("k8v4-k4v2"))
    pair.step([], [])
    pair.step([-1, -1], [1, 5])


def test_wrong_tensors_are_refused(kernels):
    state = kernels.place(make_state("k8v4"))
    with pytest.raises(ValueError, match="seq_lens"):
        kernels.plan_decode(state, ints(0), ints(1).long())
    plan = kernels.plan_decode(state, ints(0), ints(1))
    key = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="layer must be in"):
        kernels.append(state, 1, plan, key, key)
    with pytest.raises(ValueError, match=r"^key must be"):
        kernels.append(state, 0, plan, key.float(), key)
    with pytest.raises(ValueError, match=r"^value must be"):
        kernels.append(state, 0, plan, key, key.half())
