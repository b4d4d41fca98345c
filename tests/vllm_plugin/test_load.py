"""Concurrent streaming clients, hang-ups and preemptions; a longer run: tools/load.py."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "load.py"
SECONDS = 45


def test_load() -> None:
    run = subprocess.run(
        [sys.executable, SCRIPT, "--seconds", str(SECONDS), "--clients", "64", "--quant", "k16v16"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["num_errors"] == 0
    assert result["blocks_in_use_at_end"] == 0
    assert result["preemptions"] > 0
    assert result["hung_up"] > 0
    assert result["equal_to_alone"] == result["finished"] > 0
