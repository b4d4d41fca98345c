"""However many threads the CPU's kernels have, no bit of a result changes."""

import pytest
import torch
from backends import CPU, ints
from make import assert_same
from test_attend import attended, ragged
from test_significance import make_case


@pytest.fixture(params=[1, 5])
def threads(request):
    """To compare with two."""
    torch.set_num_threads(2)
    return request.param


def test_significance(threads):
    case = make_case([80, 64], [900, 333], dtype=torch.bfloat16)
    expected = CPU.significance(*case, 64)
    torch.set_num_threads(threads)
    assert torch.equal(CPU.significance(*case, 64), expected)


def test_a_life(threads):
    query = torch.randn(4, 12, 64).bfloat16()
    outputs, states = [], []
    for number in (2, threads):
        torch.set_num_threads(number)
        state = ragged(CPU)
        state.prompt_lens.copy_(ints(4999, 1, 700, 2000))
        state.thresholds.copy_(torch.tensor([3.0, 0.1]).expand(4, 2))
        outputs.append(attended(CPU, state, [0, 1, 2, 3], query))
        plan = CPU.plan_decode(state, ints(0, 1, 2, 3), ints(5000, 2, 701, 2001))
        CPU.append(state, 0, plan, query[:, :3].contiguous(), query[:, 3:6].contiguous())
        CPU.release(state, ints(1, 2), -1)
        states.append(state)
    assert torch.equal(*outputs)
    assert_same(*states)
