"""Tests of the Triton kernels without a GPU. They need a process of their own:

    TRITON_INTERPRET=1 pytest tests/triton    results, in Triton's interpreter
    TRITON_INTERPRET=0 pytest tests/triton    machine code, compiled for GPUs that are not there

Triton reads the variable when kernels are defined, so without it nothing here is collected;
`tests/kernels/test_triton.py` runs both.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

_interpreted = os.environ.get("TRITON_INTERPRET")
if _interpreted is None:
    collect_ignore_glob = ["test_*.py"]
elif _interpreted == "1":
    collect_ignore = ["test_compile.py"]
else:
    collect_ignore_glob = ["test_[!c]*.py"]


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Fill what `torch.empty` returns, so that an output a kernel forgot to write is caught."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        if not out.numel():
            return out
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
