"""store_prompt, gather and release leave the same bytes as the reference."""

import dataclasses

import pytest
import torch
from backends import CPU, Pair, gather, ints, on_cpu
from make import DTYPES, assert_same, copy_of, make_state, make_sums, make_tiers, make_tokens

from diffkv.kernels import cpu
from diffkv.policy import DROPPED, HIGH, LOW
from diffkv.pool import check_invariants

QUANTS = ("k8v4-k4v2", "k16v16", "k8v2-k2v1g1x4", "k16v8-k4v4g4x2", "k1v1")


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [*zip(QUANTS, [DTYPES[1], *DTYPES, DTYPES[1]], strict=True), ("k16v16", DTYPES[1])],
)
def test_ragged_requests(kernels, quant, dtype):
    pair = Pair(kernels, make_state(quant, dtype=dtype, num_layers=2, num_slots=5))
    pair.store([3, 0, -1, 4], [37, 1, 60, 20], layer=1)
    check_invariants(pair.state)
    pair.gather(1, [4, 1, 0, 3], [20, 3, 1, 40], first=2)
    pair.release([4, -1, 0])
    check_invariants(pair.state)


@pytest.mark.parametrize("head_dim", [72, 96, 256])
def test_head_dims(kernels, head_dim):
    pair = Pair(kernels, make_state("k8v4-k4v2", head_dim))
    pair.store([1], [45])
    pair.gather(0, [1], [45])


@pytest.mark.parametrize("tier", [HIGH, LOW])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_page_boundary(kernels, extra, tier):
    """Of a page that was used before: what a token does not take stays."""
    state = make_state("k8v4-k4v2")
    state.pages.copy_(torch.randint(0, 256, state.pages.shape, dtype=torch.uint8))
    num = state.layout.tiers[tier].tokens_per_page + extra
    pair = Pair(kernels, state)
    pair.store([0], [num], tiers=torch.full((2, num), tier, dtype=torch.int8))
    assert pair.expected.num_pages_held[0, 0, 0, tier] == (2 if extra == 1 else 1)
    assert pair.expected.num_pages_held[0, 0, 0, 1 - tier] == 0
    pair.gather(0, [0], [num])


def test_all_dropped_and_no_token(kernels):
    pair = Pair(kernels, make_state("k8v4-k4v2"))
    pair.store([0, 2], [9, 0], tiers=torch.full((2, 9), DROPPED, dtype=torch.int8))
    assert not pair.expected.num_pages_held.any()
    pair.gather(0, [0, 1, 2], [3, 0, 1])
    pair.gather(0, [0], [0])
    pair.gather(0, [], [])
    pair.store([0], [0])
    pair.release([-1], 0)
    pair.release([])


def test_appending_in_chunks(kernels):
    pair = Pair(kernels, make_state("k8v4-k4v2", max_tokens=700))
    start = 0
    for num in (5, 300, 1, 30):
        pair.store([2], [num], starts=[start])
        start += num
    pair.gather(0, [2], [start])


def test_rows_of_key_and_value_may_be_apart(kernels):
    pair = Pair(kernels, make_state("k8v4-k4v2", 64))
    tokens = make_tokens(pair.expected, [0], [20])
    packed = torch.cat([tokens.key, tokens.value], dim=1)
    tokens = dataclasses.replace(tokens, key=packed[:, :2], value=packed[:, 2:])
    tiers, sums = make_tiers(pair.expected, 20), make_sums(pair.expected, 20)
    pair.both("store_prompt", 0, tokens, tiers, sums)


def test_rows_of_what_is_gathered_may_be_apart():
    """Of the CPU's kernels: GPUs write them packed."""
    state = make_state("k8v4-k4v2")
    CPU.fill(state, [30, 12])
    key, value, tiers = gather(CPU, state, 0, [1, 0], [12, 30])
    wide = torch.zeros(42, 6, 64).bfloat16()

    cpu.gather(state, 0, ints(1, 0), ints(0, 12), wide[:, 1:3], wide[:, 4:], tiers)

    assert torch.equal(wide[:, 1:3], key) and torch.equal(wide[:, 4:], value)
    assert not wide[:, [0, 3]].any()


def test_overrun_leaves_the_state_alone(kernels):
    pair = Pair(kernels, make_state("k8v4-k4v2", num_pages=5))
    num = 3 * pair.expected.layout.high.tokens_per_page
    pair.store([0], [num], tiers=torch.zeros(2, num, dtype=torch.int8))
    assert pair.expected.overruns.item() == 1
    assert not pair.expected.num_tokens.any()
    assert not pair.expected.pages.any()


def test_ring_wraps_round(kernels):
    pair = Pair(kernels, make_state("k8v4-k4v2", num_slots=2, max_tokens=64, num_pages=11))
    for turn in range(12):
        pair.store([turn % 2], [20 + turn])
        check_invariants(pair.state)
        pair.release([turn % 2], turn % 3 - 1 if turn % 3 < 2 else 0)
    assert pair.expected.ring_ends[0] > 2 * pair.expected.num_pages
    check_invariants(pair.state)


def test_release_of_one_layer(kernels):
    state = make_state("k8v4-k4v2", num_layers=3)
    kernels.fill(state, [50, 20])
    pair = Pair(kernels, state)
    pair.release([1], 2)
    assert not pair.expected.num_tokens[1, 2].any()
    assert pair.expected.num_tokens[1, :2].any()


def test_too_small_a_buffer_is_refused():
    """By the CPU's kernels only: others would have to wait for the device."""
    state = make_state("k8v4")
    CPU.fill(state, [20], dropped=0.0)
    key, tiers = torch.zeros(50, 2, 64).bfloat16(), torch.zeros(2, 50, dtype=torch.int8)
    for slots, starts in (
        (ints(0, 1), ints(0, 19)),
        (ints(1, 0), ints(0, 31)),
        (ints(1, 1), ints(9, 8)),
    ):
        with pytest.raises(ValueError, match="must leave each row"):
            cpu.gather(state, 0, slots, starts, key, key.clone(), tiers)
    for slots, starts in ((ints(-1), ints(0)), (ints(0), ints(-1))):
        with pytest.raises(ValueError, match="must not be negative"):
            cpu.gather(state, 0, slots, starts, key, key.clone(), tiers)
    assert not key.any()


def test_full_page_table_is_refused_before_anything_changes():
    """Likewise."""
    state = make_state("k8v4", max_tokens=32, num_pages=100)
    num = state.max_pages * state.layout.high.tokens_per_page + 1
    before = copy_of(state)
    tiers = torch.zeros(2, num, dtype=torch.int8)

    with pytest.raises(ValueError, match="page table is full"):
        cpu.store_prompt(state, 0, make_tokens(state, [0], [num]), tiers, make_sums(state, num))

    assert_same(state, before)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: {"key": t.key.float()}, r"tokens\.key"),
        (lambda t: {"value": t.value[:, :1]}, r"tokens\.value"),
        (lambda t: {"slots": t.slots.long()}, r"tokens\.slots"),
        (lambda t: {"positions": t.positions[:-1]}, r"tokens\.positions"),
    ],
)
def test_wrong_tokens_are_refused(kernels, change, word):
    state = kernels.place(make_state("k8v4"))
    before, tokens = copy_of(state), make_tokens(state, [0], [4])
    wrong = dataclasses.replace(tokens, **change(tokens))
    with pytest.raises(ValueError, match=word):
        kernels.store_prompt(state, 0, wrong, make_tiers(state, 4), make_sums(state, 4))
    assert_same(on_cpu(state), on_cpu(before))


def test_wrong_slots_are_refused(kernels):
    state = kernels.place(make_state("k8v4"))
    with pytest.raises(ValueError, match="slots must be"):
        kernels.release(state, ints(0).long(), 0)
    one, key, tiers = ints(0), torch.zeros(9, 2, 64).bfloat16(), torch.zeros(2, 9, dtype=torch.int8)
    for args, word in (
        ((1, one, one, key, key, tiers), "layer must be in"),
        ((0, one.long(), one, key, key, tiers), "slots must be"),
        ((0, one, ints(0, 1), key, key, tiers), "starts must be"),
        ((0, one, one, key.float(), key, tiers), "key must be"),
        ((0, one, one, key, key[:8], tiers), "value must be"),
        ((0, one, one, key, key, tiers.T), "tiers must be"),
    ):
        with pytest.raises(ValueError, match=word):
            kernels.gather(state, *args)
