"""report says what the tables say, worked out by hand and as the reference does."""

import itertools

import pytest
import torch
from backends import REFERENCE, Pair, ints
from make import make_state, make_tiers

from diffkv.policy import DROPPED, HIGH, LOW

POISON = -7


def report(backend, state, slots, most):
    numbers = torch.full((1 + len(slots), 3 + most), POISON, dtype=torch.int64)
    backend.report(state, ints(*slots), numbers)
    return numbers.tolist()


def test_by_hand(backend):
    # Two tokens a page. Head 0: a full high page and half a low one. Head 1: a full and a half high
    # page, no low one.
    state = make_state(
        "k8v4-k8v2", 8, torch.float32, num_layers=2, num_slots=2, page_bytes=96, max_tokens=16
    )
    assert [tier.tokens_per_page for tier in state.layout.tiers] == [2, 2]
    pair = Pair(backend, state)
    tiers = torch.tensor(
        [[HIGH, HIGH, LOW, DROPPED], [HIGH, HIGH, HIGH, DROPPED]], dtype=torch.int8
    )
    for layer in range(2):
        pair.store([1], [4], layer, tiers)
    free = state.num_pages - 8
    # Head 0 could open a high page, head 1 a low one; without tokens every head opens one.
    assert report(backend, pair.state, [0, 1, -1], 1) == [
        [0, free, 0, 0],
        [0, 0, 0, 4],
        [8, 10, 2, 4],
        [0, 0, 0, 0],
    ]

    # One more low token for head 1: both its last pages are half full, the next token opens none.
    tiers = torch.tensor([[DROPPED], [LOW]], dtype=torch.int8)
    for layer in range(2):
        pair.store([1], [1], layer, tiers, starts=[4])
    assert report(backend, pair.state, [1], 3) == [
        [0, free - 2, 0, 0, 0, 0],
        # Both tokens high, head 1 one each, then one in either; a third opens one more of head 0
        [10, 10, 4, 2, 4, 6],
    ]


@pytest.mark.parametrize(
    ("quant", "most"), [("k8v4-k4v2", 0), ("k8v4-k4v2", 4), ("k8v4", 4), ("k16v16-k4v1", 1)]
)
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (3, 5)])
def test_as_the_reference(kernels, quant, layers, heads, most):
    """Of rows of many lengths, also around the ends of pages."""
    state = make_state(quant, num_layers=layers, num_kv_heads=heads, num_slots=4, max_tokens=80)
    state.demotions.fill_(2**40)
    pair = Pair(kernels, state)
    for layer, slot in itertools.product(range(layers), range(3)):
        num = [1, 33, 77][slot]
        pair.store([slot], [num], layer, make_tiers(state, num))
    slots = [2, -1, 0, 3, 1]
    got = report(kernels, pair.state, slots, most)
    assert got == report(REFERENCE, state, slots, most)
    assert got[0][2] == 2**40 and got[3][0] > 0


def test_more_heads_than_a_block(kernels):
    state = make_state("k4v4", 8, num_layers=33, num_kv_heads=32, num_slots=2, max_tokens=2)
    pair = Pair(kernels, state)
    state.num_tokens[1, ..., HIGH] = pair.state.num_tokens[1, ..., HIGH] = 2**21
    state.num_pages_held[1] = pair.state.num_pages_held[1] = 7
    got = report(kernels, pair.state, [1], 2)
    assert got == report(REFERENCE, state, [1], 2)
    assert got[1][1] == 33 * 32 * 2**21


def test_growth_is_what_the_worst_steps_take(kernels):
    """No split of tokens between tiers takes more pages, and one takes as many."""
    state = make_state("k8v4-k4v2", num_kv_heads=1, num_slots=1, max_tokens=200)
    high, low = (tier.tokens_per_page for tier in state.layout.tiers)
    pair, most = Pair(kernels, state), 4
    begun = torch.tensor([[HIGH] * (high - 1) + [LOW] * (low - 2)], dtype=torch.int8)
    pair.store([0], [high + low - 3], tiers=begun)
    growth = report(kernels, pair.state, [0], most)[1][3:]
    taken = []
    for more in range(1, most + 1):
        splits = [
            -(-max(0, n - 1) // high) + -(-max(0, more - n - 2) // low) for n in range(more + 1)
        ]
        taken.append(max(splits))
    assert growth == taken == [0, 1, 1, 1]


def test_demotions_are_counted(kernels):
    state = make_state("k8v4-k4v2", window=2, num_layers=2, max_tokens=80)
    kernels.fill(state, [30, 9], high=1.0, dropped=0.0)
    state.prompt_lens[:2] = ints(30, 9)
    state.thresholds[:2] = torch.tensor([[1e6, 0.0], [0.0, 0.0]])
    pair = Pair(kernels, state)
    for step in range(3):
        pair.step([0, -1, 1], [31 + step, 1, 10 + step])
        assert report(kernels, pair.state, [], 0)[0][2] == (step + 1) * 4
