"""Sums and positions that no decision reads are not kept, and nothing else differs without them."""

import pytest
import torch
import tracking
from backends import Pair, ints
from make import DTYPES, make_state
from test_attend import check, filled

QUANTS = ("k16v16-k4v1g4x4", "k8v4-k4v2", "k8v4")


@pytest.mark.parametrize(("quant", "dtype"), list(zip(QUANTS, DTYPES[::-1], strict=True)))
def test_nothing_differs_without_them(backend, quant, dtype):
    steps = {"reference": 8, "triton": 3, "cpu": 30}[backend.name]
    state = tracking.run(backend, quant, 64, dtype, steps)
    assert [tier.tracked for tier in state.layout.tiers] == (
        [True, False] if "-" in quant else [False]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_every_dtype(kernels, dtype):
    tracking.run(kernels, "k8v4g1x2-k4v2g2x4", 80, dtype, 2 if kernels.is_slow else 12)


@pytest.mark.parametrize("quant", QUANTS)
def test_pages_are_those_of_the_reference(kernels, quant):
    """Store, plan, append and gather, byte for byte; attention has tests of its own."""
    state = make_state(quant, 64, num_layers=2, window=6, max_tokens=120, drops=False)
    state.thresholds[:2], state.prompt_lens[:2] = torch.tensor([1e6, 0.0]), 61
    pair = Pair(kernels, state)
    for layer in range(2):
        pair.store([0, 1], [61, 9], layer)
    for step in range(2 if kernels.is_slow else 20):
        pair.step([1, -1, 0], [10 + step, 1, 62 + step])
    pair.gather(1, [1, 0], [30, 90])
    pair.release([0, 1])


def test_many_items_of_attention_without_sums_change_only_sums_of_high_tokens(kernels):
    """More than one item of work of either tier, on as many threads as there are."""
    lens = [1100, 600] if kernels.is_slow else [5000, 2100]
    shares = {"dropped": 0.0}
    state = filled(
        kernels, "k8v4-k4v2", lens, num_kv_heads=1, num_slots=2, drops=False, shares=shares
    )
    check(kernels, state, [1, 0], 4)


def test_no_probabilities_are_kept_without_sums(triton):
    from diffkv.kernels.triton.workspace import workspace

    state = make_state("k8v4", 64, torch.float32, drops=False)
    triton.fill(state, [70, 30])
    state = triton.place(state)
    before, query = state.pages.clone(), torch.randn(1, 4, 64)
    triton.attend(state, 0, ints(0), query, 0.125, torch.empty_like(query))
    assert torch.equal(state.pages, before)
    assert workspace(state).buffers["probs"].numel() == 1
