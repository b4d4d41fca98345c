"""store_prompt, gather, plan_decode, append and release leave every byte as the reference does."""

import importlib

import pytest
import torch
from make import (
    FORMATS,
    assert_same,
    copy_of,
    fill,
    make_state,
    make_sums,
    make_tiers,
    make_tokens,
)

from diffkv import pool, reference
from diffkv.kernels import triton as kernels

PAIRS = ("k8v4-k4v2", "k8v4g1x2-k4v2g2x4", "k16v16", "k8v2-k2v1g1x4")
PROMPTS, STEPS = [40, 33, 5], 8


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def store_both(state, expected, layer, slots, lens, starts=None):
    tokens = make_tokens(state, slots, lens, starts)
    tiers, sums = make_tiers(state, sum(lens)), make_sums(state, sum(lens))
    kernels.store_prompt(state, layer, tokens, tiers, sums)
    reference.store_prompt(expected, layer, tokens, tiers, sums)
    assert_same(state, expected)


def step_both(state, expected, slots, seq_lens):
    slots, seq_lens = ints(slots), ints(seq_lens)
    plan = kernels.plan_decode(state, slots, seq_lens)
    expected_plan = reference.plan_decode(expected, slots, seq_lens)
    assert torch.equal(plan.places, expected_plan.places)
    assert torch.equal(plan.positions, expected_plan.positions)
    for layer in range(state.num_layers):
        key = torch.randn(len(slots), state.num_kv_heads, state.layout.head_dim).to(state.dtype)
        value = torch.randn_like(key)
        kernels.append(state, layer, plan, key, value)
        reference.append(expected, layer, expected_plan, key, value)
    assert_same(state, expected)
    return plan.places.clone()


def with_thresholds(state, high=3.0, low=1.0):
    state.prompt_lens.copy_(ints(PROMPTS[: len(state.prompt_lens)]))
    state.thresholds[:, 0] = high if state.layout.low else low
    state.thresholds[:, 1] = low
    return state


@pytest.mark.parametrize(
    ("quant", "head_dim", "dtype"),
    [*((quant, 64, torch.bfloat16) for quant in FORMATS),
     ("k8v4-k4v2", 128, torch.bfloat16), ("k8v4g1x2-k4v2g2x4", 80, torch.float16),
     ("k16v16", 96, torch.float32), ("k8v2-k2v1g1x4", 256, torch.float32),
     ("k16v16-k16v8", 64, torch.bfloat16)],
)  # fmt: skip
def test_a_request_lives_as_in_the_reference(quant, head_dim, dtype):
    state = with_thresholds(make_state(quant, head_dim, dtype, num_layers=2, max_tokens=96))
    expected = copy_of(state)
    for layer in range(2):
        store_both(state, expected, layer, [0, -1, 2, 1], [40, 7, 5, 33])
        store_both(state, expected, layer, [2], [1], [5])
    for got, want in zip(
        kernels.gather(state, 1, 0, 41), reference.gather(expected, 1, 0, 41), strict=True
    ):
        assert got.dtype == want.dtype and torch.equal(got, want)
    for i in range(STEPS):
        step_both(state, expected, [0, -1, 2, 1], [41 + i, 3, 7 + i, 34 + i])
    kernels.release(state, ints([2, -1]), 0)
    reference.release(expected, ints([2, -1]), 0)
    assert_same(state, expected)
    kernels.release(state, ints([2, 0, 1]), -1)
    reference.release(expected, ints([2, 0, 1]), -1)
    assert_same(state, expected)
    pool.check_invariants(state)


def test_work_of_many_programs_and_blocks(monkeypatch):
    """As when there are more heads, requests and pages than one program takes at a time."""
    blocks = {
        "plan": {"APPLY_HEADS": 4, "COUNT_BLOCK": 8, "SEARCH_TOKENS": 16},
        "store": {"COUNT_BLOCK": 16, "SCAN_BLOCK": 4, "PAGE_BLOCK": 2},
        "release": {"SCAN_BLOCK": 2, "PAGE_BLOCK": 2},
    }
    for module, sizes in blocks.items():
        for name, size in sizes.items():
            path = importlib.import_module(f"diffkv.kernels.triton.{module}")
            monkeypatch.setattr(path, name, size)
    state = with_thresholds(make_state("k8v4-k4v2", num_layers=2, num_kv_heads=3, max_tokens=96))
    expected = copy_of(state)
    for layer in range(2):
        store_both(state, expected, layer, [1, 2, 0], [33, 5, 80])
    for i in range(3):
        step_both(state, expected, [0, 1, 2], [81 + i, 34 + i, 6 + i])
    for ops, s in ((kernels, state), (reference, expected)):
        ops.release(s, ints([1, 0, 2]), -1)
    assert_same(state, expected)
    pool.check_invariants(state)
    # Full pages everywhere: every head wants one
    state = make_state("k16v16", num_layers=2, num_kv_heads=3, max_tokens=48)
    expected = copy_of(state)
    for layer in range(2):
        tokens, sums = make_tokens(state, [0, 1, 2], [16, 16, 32]), make_sums(state, 64)
        for ops, s in ((kernels, state), (reference, expected)):
            ops.store_prompt(s, layer, tokens, torch.zeros(3, 64, dtype=torch.int8), sums)
    step_both(state, expected, [2, 0, 1], [33, 17, 17])


def test_every_action_occurs():
    """What the tests above compare is not only new tokens: drops, demotions, evictions, too."""
    state = with_thresholds(make_state("k8v4-k4v2", max_tokens=96, num_kv_heads=4))
    expected = copy_of(state)
    store_both(state, expected, 0, [0, 1, 2], PROMPTS)
    places = torch.cat(
        [step_both(state, expected, [0, 1, 2], [41 + i, 34 + i, 6 + i]) for i in range(STEPS)]
    )
    demoted = places[..., 2] >= 0
    assert demoted.any() and not demoted.all()
    kept, most = int(state.num_tokens.sum()), places[..., 0].numel() + sum(PROMPTS) * 4
    assert kept < most, "nothing was dropped or evicted"


@pytest.mark.parametrize("num", [1, 15, 16, 17, 32, 33])
def test_page_boundaries(num):
    """Exactly at, before and behind the end of a page: 16 tokens each of k16v16."""
    state = make_state("k16v16", 64, torch.bfloat16, max_tokens=64)
    state.pages.copy_(torch.randint(0, 256, state.pages.shape, dtype=torch.uint8))
    expected = copy_of(state)
    tokens = make_tokens(state, [1], [num])
    tiers = torch.zeros(2, num, dtype=torch.int8)
    for ops, s in ((kernels, state), (reference, expected)):
        ops.store_prompt(s, 0, tokens, tiers, make_sums(state, num) * 0)
    assert_same(state, expected)
    step_both(state, expected, [1], [num + 1])
    step_both(state, expected, [1], [num + 2])
    assert state.layout.high.tokens_per_page == 16


def test_too_few_pages_change_nothing_but_the_counter():
    state = make_state("k8v4-k4v2", num_pages=3, num_slots=2)
    expected = copy_of(state)
    store_both(state, expected, 0, [0, 1], [30, 60])
    assert int(state.overruns) == 1 and not state.num_tokens.any()
    state.overruns.zero_(), expected.overruns.zero_()
    tokens = make_tokens(state, [0], [16])
    tiers = torch.zeros(2, 16, dtype=torch.int8)
    for ops, s in ((kernels, state), (reference, expected)):
        ops.store_prompt(s, 0, tokens, tiers, torch.zeros(2, 16))
    assert int(state.overruns) == 0
    step_both(state, expected, [0], [17])  # two heads want a page each, one is free
    assert int(state.overruns) == 1


def test_the_ring_wraps_around():
    state = make_state("k4v4", num_pages=8, num_slots=2, max_tokens=64)
    expected = copy_of(state)
    for _ in range(5):
        store_both(state, expected, 0, [1], [40])
        for ops, s in ((kernels, state), (reference, expected)):
            ops.release(s, ints([1]), -1)
        assert_same(state, expected)
    assert int(state.ring_ends[0]) > 8
    pool.check_invariants(state)


@pytest.mark.parametrize("search_tokens", [16, 512])
def test_equal_means_fall_to_the_smaller_position(monkeypatch, search_tokens):
    module = importlib.import_module("diffkv.kernels.triton.plan")
    monkeypatch.setattr(module, "SEARCH_TOKENS", search_tokens)
    state = with_thresholds(make_state("k8v4-k4v2", window=2))
    expected = copy_of(state)
    tokens = make_tokens(state, [0], [40])
    tiers = torch.zeros(2, 40, dtype=torch.int8)
    tiers[:, ::3] = 1
    for ops, s in ((kernels, state), (reference, expected)):
        ops.store_prompt(s, 0, tokens, tiers, torch.zeros(2, 40))
    for i in range(4):
        step_both(state, expected, [0], [41 + i])


def test_one_long_ragged_request():
    state = with_thresholds(
        make_state("k8v4-k4v2", num_slots=1, max_tokens=1300, num_kv_heads=2, window=16)
    )
    state.prompt_lens[0] = 1200
    tokens, tiers = make_tokens(state, [0], [1200]), make_tiers(state, 1200)
    tiers[1, :1100] = 2
    sums = make_sums(state, 1200)
    expected = copy_of(state)
    kernels.store_prompt(state, 0, tokens, tiers, sums)
    reference.store_prompt(expected, 0, tokens, tiers, sums)
    assert_same(state, expected)
    step_both(state, expected, [0], [1201])


def test_nothing_to_do():
    state = make_state("k8v4-k4v2")
    before = copy_of(state)
    none = torch.empty(0, dtype=torch.int32)
    plan = kernels.plan_decode(state, none, none)
    kernels.append(
        state, 0, plan, torch.empty(0, 2, 64).bfloat16(), torch.empty(0, 2, 64).bfloat16()
    )
    kernels.release(state, none, -1)
    kernels.release(state, ints([-1]), 0)
    tiers, sums = torch.empty(2, 0, dtype=torch.int8), torch.empty(2, 0)
    kernels.store_prompt(state, 0, make_tokens(state, [0], [0]), tiers, sums)
    assert kernels.gather(state, 0, 0, 0)[0].shape == (2, 0, 64)
    assert_same(state, before)


def test_rows_of_keys_may_be_apart():
    state = make_state("k8v4")
    expected = copy_of(state)
    tokens = make_tokens(state, [0], [9])
    wide = torch.randn(9, 4, 64).bfloat16()
    object.__setattr__(tokens, "key", wide[:, :2])
    object.__setattr__(tokens, "value", wide[:, 2:])
    tiers = torch.zeros(2, 9, dtype=torch.int8)
    kernels.store_prompt(state, 0, tokens, tiers, torch.zeros(2, 9))
    reference.store_prompt(expected, 0, tokens, tiers, torch.zeros(2, 9))
    assert_same(state, expected)


def test_wrong_arguments_are_named():
    state = make_state("k8v4")
    fill(reference, state, [9])
    plan = kernels.plan_decode(state, ints([0]), ints([10]))
    key = torch.zeros(1, 2, 64).bfloat16()
    with pytest.raises(ValueError, match="layer must be in"):
        kernels.append(state, 1, plan, key, key)
    with pytest.raises(ValueError, match=r"^key must be a tensor"):
        kernels.append(state, 0, plan, key.float(), key)
    with pytest.raises(ValueError, match=r"^slots must be a contiguous tensor"):
        kernels.release(state, ints([0]).long(), 0)
    with pytest.raises(ValueError, match="slot must be in"):
        kernels.gather(state, 0, 3, 9)
