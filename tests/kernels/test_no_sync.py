"""A decode step neither waits for the device nor allocates, once it has run at its size."""

import pytest
import torch
from backends import INTERPRETED
from make import fill, make_state, set_chain
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from diffkv import reference
from diffkv.kernels import triton as kernels
from diffkv.state import NewTokens

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter would launch")

VIEWS = {
    "aten.view",
    "aten.slice",
    "aten.select",
    "aten._unsafe_view",
    "aten.alias",
    "aten.detach",
    "aten.unbind",
}


class Recorder(TorchDispatchMode):
    """Notes every operation that is not a mere view."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rsplit(".", 1)[0]
        if name not in VIEWS:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Kernels are counted and not run: the interpreter itself copies tensors."""
    names = []
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: names.append(self.fn.__name__)
    )
    return names


def step(state, slots, seq_lens, tensors):
    query, key, value, output, numbers = tensors
    plan = kernels.plan_decode(state, slots, seq_lens)
    for layer in range(state.num_layers):
        new = NewTokens(plan, key, value)
        kernels.attend(state, layer, slots, query, 0.125, output, None, new)
    kernels.report(state, slots, numbers[: 1 + len(slots)])
    kernels.release(state, slots, -1)


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize("chain", [[], [3], [4, 3]])
def test_a_decode_step_is_only_launches(launches, chain, num_requests):
    """As many of them with closed rows as without."""
    shape = {"num_slots": 5, "segment": 64} if chain else {}
    state = make_state("k8v4-k4v2", num_layers=2, **shape)
    fill(reference, state, [20, 9, 4])
    if chain:
        set_chain(state, 0, chain)
    slots = torch.arange(num_requests, dtype=torch.int32)
    seq_lens = torch.full((num_requests,), 21, dtype=torch.int32)
    shape = (num_requests, 8, 64)
    tensors = (
        torch.zeros(shape).bfloat16(),
        torch.zeros(num_requests, 2, 64).bfloat16(),
        torch.zeros(num_requests, 2, 64).bfloat16(),
        torch.zeros(shape).bfloat16(),
        torch.zeros(8, 7, dtype=torch.int64),
    )
    step(state, slots, seq_lens, tensors)
    launches.clear()
    with Recorder() as recorder:
        step(state, slots, seq_lens, tensors)
    assert recorder.operations == []
    assert len(launches) == 3 + state.num_layers * 3 + 1 + 2


def test_the_recorder_sees_what_it_must():
    with Recorder() as recorder:
        x = torch.empty(3, dtype=torch.int32).fill_(1)
        x.sum().item()
        x.nonzero()
        x - 1
    assert {"aten.empty", "aten._local_scalar_dense", "aten.nonzero", "aten.sub"} <= {
        name.removesuffix(".memory_format") for name in recorder.operations
    }


def test_other_operations_do_not_wait_either(launches):
    """They may allocate what they return, but no length comes back from the device."""
    state = make_state("k8v4-k4v2")
    starts = torch.tensor([0, 5], dtype=torch.int32)
    query, key = torch.zeros(5, 8, 64), torch.zeros(5, 2, 64)
    row, read, tiers = starts[:1], key.bfloat16(), torch.zeros(2, 5, dtype=torch.int8)
    sums, bounds = torch.zeros(2, 5), torch.zeros(1, 2)
    centring = torch.tensor([[0, 1, -1, -1]], dtype=torch.int32)
    with Recorder() as recorder:
        kernels.significance(query, key, starts, starts, starts, 5, 0.125, 64)
        kernels.gather(state, 0, row, row, read, read, tiers)
        kernels.decide_rows(sums, starts, bounds, row, 8, 64, tiers)
        kernels.centre_rows(state, 0, centring, starts, read)
    assert set(recorder.operations) <= {"aten.empty", "aten.fill_", "aten.empty_like", "aten.zeros"}
