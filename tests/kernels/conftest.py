"""Backends of the contract tests, and what all tests of operations need.

`backend` is each of reference, cpu and triton, for what is true of itself; `kernels` is the last two,
for what the reference says. Triton's kernels run on the GPU, where there is one, and then are marked
gpu; elsewhere in Triton's interpreter.
"""

import pytest
import torch
from backends import CPU, HAS_TRITON, INTERPRETED, REFERENCE, Backend, import_triton

# Before any test module can
TRITON = (
    Backend("triton", import_triton(), "cpu" if INTERPRETED else "cuda") if HAS_TRITON else None
)
triton_param = pytest.param(
    TRITON,
    id="triton",
    marks=[
        pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
        *([] if INTERPRETED else [pytest.mark.gpu]),
    ],
)
cpu_param = pytest.param(CPU, id="cpu")


@pytest.fixture(params=[pytest.param(REFERENCE, id="reference"), cpu_param, triton_param])
def backend(request):
    return request.param


@pytest.fixture(params=[cpu_param, triton_param])
def kernels(request):
    return request.param


@pytest.fixture(params=[triton_param])
def triton(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Fill what `torch.empty` returns, so that an output a kernel forgot to write is caught."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def poisoned(make):
    """`make`, whose tensors are full of what no result is."""

    def made(*args, **kwargs):
        out = make(*args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)

    return made


@pytest.fixture(autouse=True)
def several_threads():
    """More than one, also where the process was given one; what a test sets is undone."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)
