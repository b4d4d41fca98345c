"""Odd requests, beside stock vLLM; more of them: tools/fuzz_server.py."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "tools" / "fuzz_server.py"
NUM = 150


def test_requests_are_answered_as_by_stock_vllm() -> None:
    run = subprocess.run(
        [sys.executable, SCRIPT, "--num", str(NUM)], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["requests"] == NUM
    assert result["differing"] == 0 and result["faults"] == []
    assert result["server_errors"] == result["server_errors_stock"]
    assert result["compared_word_for_word"] > NUM // 4
    assert result["hung_up"] > 0
