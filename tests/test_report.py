"""`diffkv report`: numbers of its tables against numbers worked out here, and its refusals."""

import csv
import json

import pytest
from matplotlib.image import imread
from scipy.stats import ttest_1samp

from diffkv.cli import main

PROVENANCE = {"command": "diffkv eval", "commit": None, "versions": {}, "device": "a CPU"}


def task_row(accuracy, *, task="recall", num_bytes=400.0, full=0.9, n=50):
    difference = accuracy - full
    return {
        "task": task, "setting": "easy", "n": n, "accuracy": accuracy, "accuracy_full": full,
        "exact": 0.5, "exact_full": 0.6, "ci95_difference": [difference - 0.02, difference + 0.01],
        "bytes_per_token": num_bytes, "ratio_bf16": 1536 / num_bytes, "nominal_ratio_bf16": 5.0,
        "high": 0.25, "low": 0.75, "dropped": 0.0,
    }  # fmt: skip


def kld_row(mean):
    return {
        "mode": "forced", "n": 4, "steps": 100, "kld_mean": mean, "kld_median": mean / 2,
        "kld_p999": 10 * mean, "same_top1": 0.99, "first_divergence": 90.0, "diverged": 0.25,
        "bytes_per_token": 400.0, "ratio_bf16": 3.84, "nominal_ratio_bf16": 5.0, "high": 0.25,
        "low": 0.75, "dropped": 0.0,
    }  # fmt: skip


def run(tasks=(), kld=(), *, policy="paper", seed=0):
    return {
        "model": "reference", "engine": "hf", "quant": "k8v4-k4v2", "policy": policy,
        "alpha_high": 3.0, "alpha_low": 0.0, "window": 64, "seed": seed,
        "suite": "synth" if tasks else "kld", "tasks": list(tasks), "kld": list(kld),
        "seconds": 1.0, "provenance": PROVENANCE,
    }  # fmt: skip


HEADS = {
    "model": "reference", "quant": "k8v4-k4v2", "alpha_high": 3.0, "alpha_low": 0.0, "window": 64,
    "num_tokens": 80, "shares": {"high": [[0.2, 0.9]], "low": [[0.8, 0.1]], "dropped": [[0.0, 0.0]]},
}  # fmt: skip


def report(tmp_path, *objects):
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in objects))
    out = tmp_path / "report"
    assert main(["report", str(file), "--out", str(out)]) == 0
    return out


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_seeds_are_averaged_with_students_interval(tmp_path):
    accuracies = [0.85, 0.80, 0.87]
    out = report(tmp_path, *(run([task_row(a)], seed=seed) for seed, a in enumerate(accuracies)))
    (row,) = rows_of(out / "tasks.csv")
    assert (row["seeds"], row["n"]) == ("3", "150")
    assert float(row["accuracy"]) == pytest.approx(0.84)
    expected = ttest_1samp([a - 0.9 for a in accuracies], 0).confidence_interval()
    assert float(row["ci95_low"]) == pytest.approx(expected.low)
    assert float(row["ci95_high"]) == pytest.approx(expected.high)
    assert "| 84.0 | 90.0 | -6.0 (-15.0 to +3.0) |" in (out / "report.md").read_text()


def test_one_seed_keeps_its_own_interval_and_tasks_are_averaged(tmp_path):
    ours = [task_row(0.9, num_bytes=400.0), task_row(0.7, task="chain", num_bytes=500.0)]
    others = [task_row(0.6, num_bytes=400.0)]
    out = report(tmp_path, run(ours), run(others, policy="random"))
    rows = {(row["policy"], row["task"]): row for row in rows_of(out / "tasks.csv")}
    assert float(rows["paper", "chain"]["ci95_low"]) == pytest.approx(-0.22)
    mean = (out / "report.md").read_text().split("| task |")[0]
    # A task that one method lacks is in no mean.
    assert "| paper k8v4-k4v2 alpha 3/0 | 400.0 | 3.84 | 5.00 |" in mean
    assert "| random k8v4-k4v2 alpha 3/0 | 400.0 | 3.84 | 5.00 |" in mean


def test_pictures_are_drawn(tmp_path):
    results = run([task_row(0.8), task_row(0.7, task="chain")]), run(kld=[kld_row(0.01)])
    out = report(tmp_path, *results, HEADS)
    text = (out / "report.md").read_text()
    names = sorted(path.name for path in out.glob("*.png"))
    assert names == [
        "heads-reference-0.png", "kld-reference-forced.png", "loss-reference-synth-easy.png",
        "pareto-reference-synth-easy.png",
    ]  # fmt: skip
    for name in names:
        assert f"]({name})" in text
        assert imread(out / name)[..., :3].std() > 0.02
    (row,) = rows_of(out / "kld.csv")
    assert float(row["kld_p999"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is not JSON, nor one JSON object a line"),
        ("[1]", "holds no JSON object"),
        ('{"model": "m"}', "is no result of diffkv eval --json or diffkv inspect --json: engine"),
        (json.dumps(run([task_row(1.5)])), "tasks.0.accuracy: Input should be less than"),
        (f"{json.dumps(run([task_row(0.5)]))}\n" * 2, "holds the same result as"),
        (
            f"{json.dumps(run([task_row(0.5)]))}\n{json.dumps(run([task_row(0.6)]))}",
            "two results of paper k8v4-k4v2 alpha 3/0 at recall easy have seed 0",
        ),
    ],
)
def test_refusals(tmp_path, capsys, content, message):
    file = tmp_path / "file.json"
    file.write_text(content)
    assert main(["report", str(file), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 2
    assert "none.json" in capsys.readouterr().err
