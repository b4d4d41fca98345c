import pytest
import torch
import tracking
from make import copy_of, fill, make_state

from diffkv import reference
from diffkv.kernels import triton as kernels
from diffkv.kernels.triton.workspace import workspace


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [("k8v4-k4v2", torch.bfloat16), ("k8v4", torch.float32), ("k16v16-k4v1g4x4", torch.float16)],
)
def test_nothing_differs_without_sums_that_nobody_reads(quant, dtype):
    tracking.run(kernels, quant, 64, dtype, 6)


@pytest.mark.parametrize("quant", ["k8v4-k4v2", "k8v4"])
def test_pages_are_those_of_the_reference(quant):
    """Store, plan, append and gather, byte for byte."""
    state = make_state(quant, 64, num_layers=2, window=6, max_tokens=80, drops=False)
    expected = copy_of(state)
    for ops, each in ((kernels, state), (reference, expected)):
        torch.manual_seed(1)
        fill(ops, each, [61, 9])
        each.thresholds[:2], each.prompt_lens[:2] = torch.tensor([1e6, 0.0]), 61
    slots = torch.tensor([1, -1, 0], dtype=torch.int32)
    for step in range(4):
        seq_lens = torch.tensor([10, 1, 62], dtype=torch.int32) + step
        plan = kernels.plan_decode(state, slots, seq_lens)
        wanted = reference.plan_decode(expected, slots, seq_lens)
        assert torch.equal(plan.places, wanted.places)
        for layer in range(2):
            key, value = torch.randn(2, 3, 2, 64).to(state.dtype)
            kernels.append(state, layer, plan, key, value)
            reference.append(expected, layer, wanted, key, value)
        assert torch.equal(state.pages, expected.pages)
    for got, want in zip(
        kernels.gather(state, 1, 0, 80), reference.gather(expected, 1, 0, 80), strict=True
    ):
        assert torch.equal(got, want)


def test_no_probabilities_are_kept_without_sums():
    state = make_state("k8v4", 64, torch.float32, drops=False)
    fill(reference, state, [70, 30])
    before, query = state.pages.clone(), torch.randn(1, 4, 64)
    kernels.attend(
        state, 0, torch.zeros(1, dtype=torch.int32), query, 0.125, torch.empty_like(query)
    )
    assert torch.equal(state.pages, before)
    assert workspace(state).buffers["probs"].numel() == 1
