"""store_prompt, gather and release leave the same bytes as the reference."""

import dataclasses

import pytest
import torch
from make import (
    DTYPES,
    assert_same,
    copy_of,
    fill,
    make_state,
    make_sums,
    make_tiers,
    make_tokens,
)

from diffkv import reference
from diffkv.kernels import cpu
from diffkv.policy import DROPPED, HIGH, LOW
from diffkv.pool import check_invariants

QUANTS = ("k8v4-k4v2", "k16v16", "k8v2-k2v1g1x4", "k16v8-k4v4g4x2", "k1v1")


def store_both(state, expected, tokens, tiers, sums, layer=0):
    cpu.store_prompt(state, layer, tokens, tiers, sums)
    reference.store_prompt(expected, layer, tokens, tiers, sums)
    assert_same(state, expected)


def gather_both(state, expected, layer, slot, max_tokens):
    for got, want in zip(
        cpu.gather(state, layer, slot, max_tokens),
        reference.gather(expected, layer, slot, max_tokens),
        strict=True,
    ):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", QUANTS)
def test_ragged_requests(quant, dtype):
    state = make_state(quant, dtype=dtype, num_layers=2, num_slots=5)
    expected = copy_of(state)
    lens = [37, 1, 60, 20]
    tokens = make_tokens(state, [3, 0, -1, 4], lens)
    tiers, sums = make_tiers(state, sum(lens)), make_sums(state, sum(lens))

    store_both(state, expected, tokens, tiers, sums, layer=1)

    check_invariants(state)
    for slot in (0, 1, 3, 4):
        gather_both(state, expected, 1, slot, 40)
    slots = torch.tensor([4, -1, 0], dtype=torch.int32)
    cpu.release(state, slots, -1)
    reference.release(expected, slots, -1)
    assert_same(state, expected)
    check_invariants(state)


@pytest.mark.parametrize("head_dim", [72, 80, 96, 128, 256])
def test_head_dims(head_dim):
    state = make_state("k8v4-k4v2", head_dim)
    expected = copy_of(state)
    tokens = make_tokens(state, [1], [45])

    store_both(state, expected, tokens, make_tiers(state, 45), make_sums(state, 45))

    gather_both(state, expected, 0, 1, 45)


@pytest.mark.parametrize("tier", [HIGH, LOW])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_page_boundary(extra, tier):
    state = make_state("k8v4-k4v2")
    num = state.layout.tiers[tier].tokens_per_page + extra
    expected = copy_of(state)
    tiers = torch.full((2, num), tier, dtype=torch.int8)

    store_both(state, expected, make_tokens(state, [0], [num]), tiers, make_sums(state, num))

    assert state.num_pages_held[0, 0, 0, tier] == (2 if extra == 1 else 1)
    assert state.num_pages_held[0, 0, 0, 1 - tier] == 0


def test_all_dropped_and_no_token():
    state = make_state("k8v4-k4v2")
    expected = copy_of(state)
    tiers = torch.full((2, 9), DROPPED, dtype=torch.int8)

    store_both(state, expected, make_tokens(state, [0, 2], [9, 0]), tiers, make_sums(state, 9))

    assert not state.num_pages_held.any()
    gather_both(state, expected, 0, 0, 3)
    gather_both(state, expected, 0, 0, 0)


def test_appending_in_chunks():
    state = make_state("k8v4-k4v2", max_tokens=700)
    expected = copy_of(state)
    start = 0
    for num in (5, 300, 1, 30):
        tokens = make_tokens(state, [2], [num], [start])
        store_both(state, expected, tokens, make_tiers(state, num), make_sums(state, num))
        start += num
    gather_both(state, expected, 0, 2, start)


def test_rows_of_key_and_value_may_be_apart():
    state = make_state("k8v4-k4v2", 64)
    expected = copy_of(state)
    tokens = make_tokens(state, [0], [20])
    packed = torch.cat([tokens.key, tokens.value], dim=1)
    tokens = dataclasses.replace(tokens, key=packed[:, :2], value=packed[:, 2:])

    store_both(state, expected, tokens, make_tiers(state, 20), make_sums(state, 20))


def test_overrun_leaves_the_state_alone():
    state = make_state("k8v4-k4v2", num_pages=5)
    expected = copy_of(state)
    num = 3 * state.layout.high.tokens_per_page
    tiers = torch.zeros(2, num, dtype=torch.int8)

    store_both(state, expected, make_tokens(state, [0], [num]), tiers, make_sums(state, num))

    assert state.overruns.item() == 1
    assert not state.num_tokens.any()
    assert not state.pages.any()


def test_ring_wraps_round():
    state = make_state("k8v4-k4v2", num_slots=2, max_tokens=64, num_pages=11)
    expected = copy_of(state)
    for turn in range(12):
        slot = turn % 2
        num = 20 + turn
        tokens = make_tokens(state, [slot], [num])
        store_both(state, expected, tokens, make_tiers(state, num), make_sums(state, num))
        check_invariants(state)
        slots = torch.tensor([slot], dtype=torch.int32)
        cpu.release(state, slots, 0)
        reference.release(expected, slots, 0)
        assert_same(state, expected)
    assert state.ring_ends[0] > 2 * state.num_pages


def test_release_of_one_layer():
    state = make_state("k8v4-k4v2", num_layers=3)
    fill(cpu, state, [50, 20])
    expected = copy_of(state)
    slots = torch.tensor([1], dtype=torch.int32)

    cpu.release(state, slots, 2)
    reference.release(expected, slots, 2)

    assert_same(state, expected)
    assert not state.num_tokens[1, 2].any()
    assert state.num_tokens[1, :2].any()


def test_threads_do_not_change_a_byte():
    states = []
    for threads in (1, 2):
        torch.manual_seed(3)
        torch.set_num_threads(threads)
        states.append(make_state("k8v4-k4v2", max_tokens=2000, num_slots=2))
        fill(cpu, states[-1], [1000, 1900])
    assert_same(*states)


def test_too_small_a_buffer_is_refused():
    state = make_state("k8v4")
    fill(cpu, state, [20], dropped=0.0)
    with pytest.raises(ValueError, match="max_tokens"):
        cpu.gather(state, 0, 0, 19)


def test_full_page_table_is_refused_before_anything_changes():
    state = make_state("k8v4", max_tokens=32)
    num = state.max_pages * state.layout.high.tokens_per_page + 1
    before = copy_of(state)
    tiers = torch.zeros(2, num, dtype=torch.int8)

    with pytest.raises(ValueError, match="page table is full"):
        cpu.store_prompt(state, 0, make_tokens(state, [0], [num]), tiers, make_sums(state, num))

    assert_same(state, before)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: {"key": t.key.float()}, "tokens.key"),
        (lambda t: {"value": t.value[:, :1]}, "tokens.value"),
        (lambda t: {"slots": t.slots.long()}, "tokens.slots"),
        (lambda t: {"positions": t.positions[:-1]}, "tokens.positions"),
    ],
)
def test_wrong_tensors_are_refused(change, word):
    state = make_state("k8v4")
    tokens = make_tokens(state, [0], [4])
    wrong = dataclasses.replace(tokens, **change(tokens))
    with pytest.raises(ValueError, match=word):
        cpu.store_prompt(state, 0, wrong, make_tiers(state, 4), make_sums(state, 4))
