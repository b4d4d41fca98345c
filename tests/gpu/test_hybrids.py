"""Models in which other layers keep vLLM's cache, on a GPU: layers have the backends that they should.

pytest -m gpu tests/gpu/test_hybrids.py --numprocesses 5 --dist loadgroup
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrids import FAMILIES, NEW_TOKENS, NUM_PROMPTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NOISE = {"bfloat16": 0.05, "float32": 0.02}
"""Drift in nats that an order of sums may be worth; vLLM's kernels round float32 to TF32."""
MAX_DRIFT = 0.3
"""Of k8v4, as on a CPU."""
TIMEOUT = 300

CASES = [
    pytest.param(family, dtype, graphs, id=name, marks=pytest.mark.xdist_group(name))
    for dtype, graphs in (("bfloat16", True), ("bfloat16", False), ("float32", False))
    for family in FAMILIES
    if (family, dtype) != ("qwen3_next", "float32")
    for name in [f"{family}-{dtype}-{'graphs' if graphs else 'eager'}"]
]


@cache
def measured(family: str, dtype: str, graphs: bool) -> dict[str, Any]:
    """What `hybrids` prints."""
    command = [sys.executable, str(Path(__file__).with_name("hybrids.py")), family]
    command += ["--dtype", dtype, *(["--graphs"] if graphs else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"not done after {TIMEOUT} s: {(error.stderr or b'').decode()[-3000:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("family", "dtype", "graphs"), CASES)
def test_lossless_is_as_near_as_stock(family: str, dtype: str, graphs: bool) -> None:
    """As near to vLLM's own cache as that is to itself, one prompt at a time."""
    found = measured(family, dtype, graphs)
    assert found["second_runner"]
    assert len({*found["backends"]} - {"CudaBackend"}) == 1, "others have vLLM's"
    assert "CudaBackend" in found["backends"]
    assert (found["graph_mode"] == "NONE") == (not graphs)
    assert found["k16v16"] < max(NOISE[dtype], 3 * found["stock_alone"])
    assert sum(found["k16v16_equal"]) >= NUM_PROMPTS * NEW_TOKENS // 2
    assert found["k16v16_pages_held"] == 0


@pytest.mark.parametrize(("family", "dtype", "graphs"), CASES)
def test_lossy_drift_is_bounded(family: str, dtype: str, graphs: bool) -> None:
    found = measured(family, dtype, graphs)
    assert found["k8v4"] < MAX_DRIFT
    assert found["k8v4"] < found["window only"]
    assert found["k8v4_pages_held"] == 0
