"""Sums and positions that no decision reads are not kept, and nothing else differs without them."""

import pytest
import torch
import tracking
from make import assert_same, copy_of, fill, make_state

from diffkv import reference
from diffkv.kernels import cpu

QUANTS = ("k8v4-k4v2", "k8v4", "k16v16-k4v1g4x4")


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
def test_nothing_differs_without_them(ops, quant):
    steps = 30 if ops is cpu else 8
    state = tracking.run(ops, quant, 64, torch.bfloat16, steps)
    assert [tier.tracked for tier in state.layout.tiers] == (
        [True, False] if "-" in quant else [False]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_every_dtype(dtype):
    tracking.run(cpu, "k8v4g1x2-k4v2g2x4", 80, dtype, 12)


@pytest.mark.parametrize("quant", QUANTS)
def test_pages_are_those_of_the_reference(quant):
    """Store, plan and append, byte for byte, and attention beside the sums."""
    state = make_state(quant, 64, num_layers=2, window=6, max_tokens=120, drops=False)
    fill(cpu, state, [61, 9])
    state.thresholds[:2], state.prompt_lens[:2] = torch.tensor([1e6, 0.0]), 61
    expected = copy_of(state)
    slots = torch.tensor([1, -1, 0], dtype=torch.int32)
    for step in range(20):
        seq_lens = torch.tensor([10, 1, 62], dtype=torch.int32) + step
        plans = [ops.plan_decode(each, slots, seq_lens)
                 for ops, each in ((cpu, state), (reference, expected))]  # fmt: skip
        assert torch.equal(plans[0].places, plans[1].places)
        for layer in range(2):
            key, value = torch.randn(2, 3, 2, 64).to(state.dtype)
            cpu.append(state, layer, plans[0], key, value)
            reference.append(expected, layer, plans[1], key, value)
        assert_same(state, expected)


def test_many_items_of_attention_without_sums():
    """More than one item of work of either tier, on as many threads as there are."""
    state = make_state("k8v4-k4v2", num_kv_heads=1, max_tokens=5000, num_slots=2, drops=False)
    fill(cpu, state, [5000, 2100], dropped=0.0)
    query, slots = torch.randn(2, 4, 64).to(state.dtype), torch.tensor([1, 0], dtype=torch.int32)
    expected, before = copy_of(state), state.pages.clone()
    output, wanted = torch.empty_like(query), torch.empty_like(query)
    cpu.attend(state, 0, slots, query, 0.125, output)
    reference.attend(expected, 0, slots, query, 0.125, wanted)
    torch.testing.assert_close(output.float(), wanted.float(), rtol=2**-7, atol=1e-3)
    high = state.layout.high
    changed = (state.pages != before).any(0).nonzero().flatten()
    assert high.sums <= int(changed.min()) and int(changed.max()) < high.positions
    torch.testing.assert_close(
        *(x[:, high.sums : high.positions].contiguous().view(torch.float32).nan_to_num(0)
          for x in (state.pages, expected.pages)), rtol=1e-5, atol=1e-5,
    )  # fmt: skip
