"""Shared by the tests of the operations."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Fill what `torch.empty` returns, so that an output a kernel forgot to write is caught."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def several_threads():
    """More than one, also where the process was given one; what a test sets is undone."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)
