"""lm-evaluation-harness itself runs a task of the repository, without a network, on both caches."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from diffkv.cli import main
from diffkv.lab.evaluation.results import scores
from diffkv.lab.rows import Row

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
        arguments = [
            "--tasks",
            str(TASK),
            "--limit",
            str(NUM),
            "--max-model-len",
            "1024",
            "--alpha-high",
            "5",
            "--alpha-low",
            "1",
        ]
        out = folder / "result.json"
        assert main(["eval", "--suite", "lm-eval", *arguments, "--json", "--out", str(out)]) == 0
    return out


def test_scores_and_bytes(result):
    row = Row.parse(result.read_text())
    assert (row["suite"], row["engine"], row["policy"]) == ("lm-eval", "vllm", "paper")
    (score,) = scores(row)
    assert (score.task, score.setting, score.n) == ("lists", "benchmark", NUM)
    assert score.accuracy_full == 1
    assert score.accuracy >= 0.5
    assert score.high + score.low + score.dropped == pytest.approx(1, abs=1e-5)
    assert 0.3 < score.dropped < 0.7
    # Codes of kept tokens alone, of 16 bits: 16 / 2 bits an element high, 6 / 2 low.
    nominal = 16 / (8 * score.high + 3 * score.low)
    assert score.nominal_ratio_bf16 == pytest.approx(nominal, rel=1e-4)
    assert score.ratio_bf16 == pytest.approx(1536 / score.bytes_per_token, rel=1e-4)
    assert 1.5 < score.ratio_bf16 < score.nominal_ratio_bf16
    assert row["harness"].startswith("0.4") and row.provenance.vllm


def test_it_can_be_reported(result, tmp_path):
    assert main(["report", str(result), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert (
        "Means over lists:" in text
        and "| paper k8v8-k4v2 alpha 5/1 hadamard segment 2048 |" in text
    )
    (file,) = tmp_path.glob("pareto-reference-lm-eval-benchmark-samples-6-*.png")
    picture = imread(file)
    assert picture[..., :3].std() > 0.02
