"""Runs `tests/triton`, whose tests need processes of their own: see its conftest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "triton"
MINUTES = 15


@pytest.mark.slow
@pytest.mark.parametrize("interpret", ["1", "0"], ids=["interpreted", "compiled"])
def test_triton_kernels(interpret):
    pytest.importorskip("triton")
    # Minutes in one process: two share what cores are free
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", str(TESTS)
    ]  # fmt: skip
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=MINUTES * 60
    )
    print(result.stdout[-4000:], result.stderr[-2000:])
    assert result.returncode == 0, f"TRITON_INTERPRET={interpret} pytest {TESTS} failed"
