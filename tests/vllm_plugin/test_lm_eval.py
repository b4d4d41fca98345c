"""lm-evaluation-harness itself runs a task of the repository, without a network, on both caches."""

import json
from pathlib import Path

import pytest

from diffkv.cli import main

TASK = Path(__file__).parents[2] / "examples" / "lm_eval" / "lists.yaml"
NUM = 6
WORDS = 8
"""Of each answer: the first comes from the prefill, the last is never read from the cache."""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """One run of the command, with thresholds that drop a part of the prompt."""
    folder = tmp_path_factory.mktemp("lm_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.chdir(folder)  # the task's data is found beside the task
        arguments = ["--tasks", str(TASK), "--limit", str(NUM), "--max-model-len", "1024",
                     "--alpha-high", "5", "--alpha-low", "1"]  # fmt: skip
        out = folder / "result.json"
        assert main(["eval", "--suite", "lm-eval", *arguments, "--json", "--out", str(out)]) == 0
    return out


def test_scores_and_bytes(result):
    run = json.loads(result.read_text())
    assert (run["suite"], run["engine"], run["policy"]) == ("lm-eval", "vllm", "paper")
    (row,) = run["tasks"]
    assert (row["task"], row["setting"], row["n"]) == ("lists", "benchmark", NUM)
    assert row["accuracy_full"] == 1
    assert row["accuracy"] >= 0.5
    assert row["high"] + row["low"] + row["dropped"] == pytest.approx(1)
    assert 0.3 < row["dropped"] < 0.7
    # Codes of kept tokens alone, of 16 bits: 12 / 2 bits an element high, 6 / 2 low.
    nominal = 16 / (6 * row["high"] + 3 * row["low"])
    assert row["nominal_ratio_bf16"] == pytest.approx(nominal)
    assert row["ratio_bf16"] == pytest.approx(1536 / row["bytes_per_token"])
    assert 1.5 < row["ratio_bf16"] < row["nominal_ratio_bf16"]
    assert "lm_eval" in run["provenance"]["versions"]


def test_it_can_be_reported(result, tmp_path):
    assert main(["report", str(result), "--out", str(tmp_path)]) == 0
    assert "| lists | paper k8v4-k4v2 alpha 5/1 hadamard |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "pareto-reference-lm-eval-benchmark.png").stat().st_size > 10_000
