"""`diffkv report`: numbers of its tables against numbers worked out here, and its refusals."""

import csv

import pytest
from matplotlib.image import imread
from scipy.stats import ttest_1samp

from diffkv.cli import main
from diffkv.lab.evaluation.results import HEADS, KLD, TASKS, KldScore, TaskScore, figures
from diffkv.lab.provenance import Provenance
from diffkv.lab.rows import Row

PROVENANCE = Provenance(command="diffkv eval", device="a CPU", diffkv="1", torch="2")
METHOD = {
    "model": "reference",
    "engine": "hf",
    "quant": "k8v4-k4v2",
    "policy": "paper",
    "alpha_high": 3.0,
    "alpha_low": 0.0,
    "window": 64,
    "rotate": "none",
}
SPENT = {"nominal_ratio_bf16": 5.0, "high": 0.25, "low": 0.75, "dropped": 0.0}
DISTANCES = {"same_top1": 0.99, "first_divergence": 90.0, "diverged": 0.25}


def task(accuracy, *, name="recall", num_bytes=400.0, full=0.9, n=50):
    lost = accuracy - full
    right = {"accuracy": accuracy, "accuracy_full": full, "exact": 0.5, "exact_full": 0.6}
    ends = {"ci95_low": lost - 0.02, "ci95_high": lost + 0.01}
    spent = {"bytes_per_token": num_bytes, "ratio_bf16": 1536 / num_bytes, **SPENT}
    return TaskScore(n=n, task=name, setting="easy", **right, **ends, **spent)


def run(*tasks, seed=0, **method):
    case = {"suite": "synth", "tasks": [each.task for each in tasks], "settings": ["easy"]}
    case = {**METHOD, **method, **case, "seed": seed}
    return Row(TASKS, case, figures(TASKS, tasks), PROVENANCE)


def kld(mean):
    figure = {"kld_mean": mean, "kld_median": mean / 2, "kld_p999": 10 * mean}
    score = KldScore(4, 400.0, 3.84, mode="forced", steps=100, **figure, **DISTANCES, **SPENT)
    case = {**METHOD, "suite": "kld", "modes": ["forced"]}
    return Row(KLD, case, figures(KLD, [score]), PROVENANCE)


def heads():
    shares = {"high": [[0.2, 0.9]], "low": [[0.8, 0.1]], "dropped": [[0.0, 0.0]]}
    return Row(HEADS, METHOD, {"num_tokens": 80, "shares": shares}, PROVENANCE)


def write(path, *rows):
    path.write_text("".join(row.to_json() + "\n" for row in rows))
    return str(path)


def report(tmp_path, *rows, options=("--csv",)):
    out = tmp_path / "report"
    file = write(tmp_path / "results.jsonl", *rows)
    assert main(["report", file, "--out", str(out), *options]) == 0
    return out


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_seeds_are_averaged_with_students_interval(tmp_path):
    accuracies = [0.85, 0.80, 0.87]
    out = report(tmp_path, *(run(task(a), seed=seed) for seed, a in enumerate(accuracies)))
    (row,) = rows_of(out / "tasks.csv")
    assert (row["seeds"], row["n"]) == ("3", "150")
    assert float(row["accuracy"]) == pytest.approx(0.84)
    expected = ttest_1samp([a - 0.9 for a in accuracies], 0).confidence_interval()
    assert float(row["ci95_low"]) == pytest.approx(expected.low)
    assert float(row["ci95_high"]) == pytest.approx(expected.high)
    text = (out / "report.md").read_text()
    assert "| 150 | 84.0% | -6.0 (-15.0 to +3.0) |" in text
    assert "Full precision is right in 90.0%." in text


def test_one_seed_keeps_its_own_interval_and_tasks_are_averaged(tmp_path):
    ours = run(task(0.9, num_bytes=400.0), task(0.7, name="chain", num_bytes=500.0))
    out = report(tmp_path, ours, run(task(0.6, num_bytes=400.0), policy="random"))
    rows = {(row["policy"], row["task"]): row for row in rows_of(out / "tasks.csv")}
    assert float(rows["paper", "chain"]["ci95_low"]) == pytest.approx(-0.22)
    mean, by_task = (out / "report.md").read_text().split("Differences by task")
    # A task that one method lacks is in no mean.
    assert "| paper k8v4-k4v2 alpha 3/0 | 400.0 | 3.84x | 5.00x |" in mean
    assert "| random k8v4-k4v2 alpha 3/0 | 400.0 | 3.84x | 5.00x |" in mean
    assert "| paper k8v4-k4v2 alpha 3/0 | +0.0 (-2.0 to +1.0) | -20.0 (-22.0 to -19.0) |" in by_task
    assert "| random k8v4-k4v2 alpha 3/0 | -30.0 (-32.0 to -29.0) |  |" in by_task


def test_models_are_compared(tmp_path):
    rows = [
        run(task(0.9 - lost), task(0.7 - lost, name="chain"), model=f"made/{name}")
        for name, lost in (("plain", 0.0), ("hard", 0.5))
    ]
    out = report(tmp_path, *rows, options=("--no-plots",))
    text = (out / "report.md").read_text()
    assert "| method | B/token | vs bf16 | nominal | plain | hard |" in text
    assert "| 5.00x | -10.0 (-20.0) | -60.0 (-70.0) |" in text
    assert [path.name for path in out.iterdir()] == ["report.md"]


def test_pictures_are_drawn(tmp_path):
    out = report(tmp_path, run(task(0.8), task(0.7, name="chain")), kld(0.01), heads())
    text = (out / "report.md").read_text()
    names = sorted(path.name for path in out.glob("*.png"))
    assert names == ["heads-reference-0.png", "pareto-reference-synth-easy.png"]
    for name in names:
        assert f"]({name})" in text
        assert imread(out / name)[..., :3].std() > 0.02
    (row,) = rows_of(out / "kld.csv")
    assert float(row["kld_p999"]) == pytest.approx(0.1)
    assert "| 4 | 0.01 | 0.005 | 0.1 | 99.0% | 90.0 |" in text


def short_of(name):
    row = run(task(0.5))
    del row.measured[name]
    return row


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "line 1"),
        ("[1]", "a row must be an object"),
        (Row("tasks", METHOD, {}, PROVENANCE).to_json(), "case names no tasks or no settings"),
        (Row("attention", METHOD, {}, PROVENANCE).to_json(), "a row of kind attention"),
        (Row("tasks", {"model": "m"}, {}, PROVENANCE).to_json(), "case lacks engine, quant"),
        (short_of("high").to_json(), "measured needs 1 values of high"),
        (f"{run(task(0.5)).to_json()}\n" * 2, "with seed 0 once more: name each result once"),
        ("", "no results"),
    ],
)
def test_refusals(tmp_path, capsys, content, message):
    file = tmp_path / "file.json"
    file.write_text(content)
    assert main(["report", str(file), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_share_above_one_is_refused(tmp_path, capsys):
    row = run(task(0.5))
    row.measured["accuracy"] = 1.5
    assert main(["report", write(tmp_path / "a.jsonl", row), "--out", str(tmp_path / "out")]) == 2
    assert "accuracy must be in 0 .. 1, got 1.5" in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 2
    assert "none.json" in capsys.readouterr().err
