"""Settings of all tests."""

import importlib.util
import os
from itertools import product

import pytest

# Threads that wait must not spin: where they outnumber the cores, that costs seconds a test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if "PYTEST_XDIST_WORKER" in os.environ:
    # There are as many workers as cores: each has one thread, and so have the processes that it
    # starts. vLLM would bind all of them to the same core.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

if importlib.util.find_spec(
    "hypothesis"
):  # the tests of operations run where there is only torch, too
    from hypothesis import settings

    # A slow machine is no fault of the code: examples have no time limit.
    settings.register_profile("diffkv", deadline=None)
    settings.load_profile("diffkv")


@pytest.fixture
def messages(monkeypatch):
    """Three texts in place of the messages that are fetched: by name, in order."""
    things = "ship mill road farm bank court school river".split()
    people = "president senator farmer teacher sailor judge".split()
    texts = {
        name: "\n\n".join(
            f"In {name} the {one} at the {other} was given back to the {person} of this very town."
            for one, other, person in product(things, things, people)
            if one != other
        )
        for name in ("spring", "summer", "autumn")
    }
    monkeypatch.setattr("diffkv.lab.evaluation.english.messages", lambda: texts)
    return texts
