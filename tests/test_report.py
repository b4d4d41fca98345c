"""`diffkv report`: numbers of its tables against numbers worked out here, and its refusals."""

import csv

import pytest
from matplotlib.image import imread
from scipy.stats import ttest_1samp

from diffkv.cli import main
from diffkv.lab.evaluation.results import DISTANCES, HEADS, TASKS, DistanceScore, TaskScore, figures
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
NEAR = {"same_top1": 0.99, "first_divergence": 90.0, "diverged": 0.25}
PERPLEXITIES = {"perplexity": 10.5, "perplexity_full": 10.0}


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


def kld(mean, cache="k8v4-k4v2", num_bytes=400.0, contexts=("all",), **settings):
    """A row of distances: of texts of each length the mean is larger."""
    case = {"model": "reference", "engine": "hf", "suite": "kld", "dtype": "float32"}
    texts = {"contexts": list(contexts), "texts": 4, "sha256": "abc", "max_steps": 25}
    found = []
    for number, context in enumerate(contexts, 1):
        first = number * mean
        figure = {"kld_mean": first, "kld_median": first / 2, "kld_p99": 5 * first}
        figure = {**figure, "kld_p999": 10 * first, **NEAR, **PERPLEXITIES}
        spent = {"bytes_per_token": num_bytes, "ratio_bf16": 1536 / num_bytes, **SPENT}
        found.append(DistanceScore(n=4, context=context, steps=100, **figure, **spent))
    case = {**case, "cache": cache, **settings, **texts}
    return Row(DISTANCES, case, figures(DISTANCES, found), PROVENANCE)


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


def test_runs_of_other_sizes_are_not_averaged(tmp_path):
    """Neither where more was asked, nor where the page is another."""
    rows = [
        run(task(0.9), tokens=1024, samples=50),
        run(task(0.5), tokens=4096, samples=50),
        run(task(0.8), tokens=4096, samples=50, more="page_bytes=4096"),
    ]
    out = report(tmp_path, *rows)
    found = [(row["asked"], row["more"], row["accuracy"]) for row in rows_of(out / "tasks.csv")]
    assert sorted(found) == [
        ("tokens 1024, samples 50", "", "0.9"),
        ("tokens 4096, samples 50", "", "0.5"),
        ("tokens 4096, samples 50", "page_bytes=4096", "0.8"),
    ]
    text = (out / "report.md").read_text()
    for tokens in (1024, 4096):
        assert f"## reference: synth, easy, tokens {tokens}, samples 50" in text
    assert "| paper k8v4-k4v2 alpha 3/0 page_bytes=4096 |" in text


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


def test_tasks_that_full_precision_fails_are_named_but_not_shown(tmp_path):
    out = report(tmp_path, run(task(0.7), task(0.3, name="chain", full=0.79)))
    text = (out / "report.md").read_text()
    assert "less than 80% of them: chain (easy, 79.0%)." in text
    assert "Full precision is right in 90.0%." in text and "Means over recall:" in text
    assert [row["task"] for row in rows_of(out / "tasks.csv")] == ["recall"]


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
    out = report(tmp_path, run(task(0.8), task(0.7, name="chain")), heads())
    text = (out / "report.md").read_text()
    names = sorted(path.name for path in out.glob("*.png"))
    assert names == ["heads-reference-0.png", "pareto-reference-synth-easy.png"]
    for name in names:
        assert f"]({name})" in text
        assert imread(out / name)[..., :3].std() > 0.02


def test_distances_have_tables_by_length_and_two_plots(tmp_path):
    contexts = ("all", 1024, 4096)
    ours = kld(0.01, quant="k8v4-k4v2", contexts=contexts)
    failed = Row(DISTANCES, kld(0, "int4").case, {}, PROVENANCE, error="no such cache")
    once_failed = Row(DISTANCES, ours.case, {}, PROVENANCE, error="was interrupted")
    out = report(tmp_path, once_failed, ours, kld(0.02, "q8_0", 800.0, contexts), failed)
    text = (out / "report.md").read_text()

    every, short, long = text.split("Texts of ")[1:]
    assert every.startswith("all lengths: 4, 100 steps, model in float32; full precision has")
    assert "| k8v4-k4v2 | 400 | 3.84x | 0.0100 | 0.0050 | 0.050 | 0.100 | 99.0% | 10.50 |" in every
    assert every.index("| k8v4-k4v2 |") < every.index("| q8_0 |")
    assert short.startswith("1,024 tokens") and "| q8_0 | 800 | 1.92x | 0.0400 |" in short
    assert long.startswith("4,096 tokens") and "| k8v4-k4v2 | 400 | 3.84x | 0.0300 |" in long
    assert "* int4: no such cache" in text and "interrupted" not in text
    for key in ("mean", "p99"):
        name = f"kld-{key}-reference-hf-float32-abc-25.png"
        assert f"]({name})" in every and imread(out / name)[..., :3].std() > 0.02
    rows = rows_of(out / "distances.csv")
    assert [row["context"] for row in rows] == ["all", "1024", "4096"] * 2
    assert float(rows[0]["kld_p999"]) == pytest.approx(0.1)


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
        (Row("distances", {"cache": "q8_0"}, {}, PROVENANCE).to_json(), "case lacks model, engine"),
        (f"{kld(0.1).to_json()}\n" * 2, "the distances of k8v4-k4v2 once more"),
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
