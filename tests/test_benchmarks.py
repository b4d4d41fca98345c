"""The benchmarks' settings against the harness that is installed, and against the docs."""

import re
from pathlib import Path

import pytest

from diffkv.cli import main
from diffkv.lab.evaluation import benchmarks

DOCS = Path(__file__).parents[1] / "docs" / "real-benchmarks.md"
SAMPLING = {"temperature": "T", "top_p": "top_p", "top_k": "top_k"}


@pytest.fixture(scope="module", name="harness")
def _harness():
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.tasks.__file__).parent
    names = (
        "aime",
        "benchmarks",
        "gpqa",
        "gsm8k",
        "humaneval",
        "longbench",
        "mbpp",
        "mmlu",
        "mmlu_pro",
    )
    return TaskManager(include_defaults=False, include_path=[folder / name for name in names])


def test_the_harness_has_every_task_and_filter(harness):
    from lm_eval.tasks._yaml_loader import load_yaml

    for benchmark in benchmarks.read_all().values():
        assert benchmark.task in harness.all_tasks, benchmark.task
        assert benchmark.source
        path = harness._index[benchmark.task].yaml_path
        config = load_yaml(path, resolve_func=False)
        filters = [each["name"] for each in config.get("filter_list", [])]
        metric, name = benchmark.metric
        if benchmark.task not in harness.all_subtasks:
            continue  # a group: its members have the filters
        assert name in (filters or ["none"])
        assert benchmark.runs_code == bool(config.get("unsafe_code"))
        if not benchmark.runs_code:  # a function of the task scores programs
            assert metric in [each["metric"] for each in config["metric_list"]]


def test_thinking_changes_what_the_file_says():
    plain, thinking = benchmarks.read_all(), benchmarks.read_all(thinking=True)
    changed = {name for name in plain if plain[name] != thinking[name]}
    assert changed == {"minerva_math", "gpqa_diamond", "aime24"}
    math = thinking["minerva_math"]
    assert (math.num_fewshot, math.max_tokens, math.chat) == (0, 16384, True)
    assert math.sampling == {"temperature": 0.6, "top_p": 0.95}
    assert all(b.rounds == 1 for b in plain.values() if not b.sampling)


def test_docs_list_the_settings():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", DOCS.read_text(), re.M)
    expected = []
    for b in benchmarks.read_all().values():
        sampling = ", ".join(f"{SAMPLING[key]} {value:g}" for key, value in b.sampling.items())
        shots = "task's" if b.num_fewshot is None else b.num_fewshot
        tokens = "task's" if b.max_tokens is None else b.max_tokens
        cells = (b.task, ", ".join(b.metric), shots, tokens, sampling or "greedy", b.rounds)
        expected.append((b.name, " | ".join(map(str, cells))))
    assert rows == expected


def test_names():
    found = benchmarks.find(["gsm8k", "harness:piqa", "harness:gsm8k:exact_match/strict-match"])
    assert [b.task for b in found] == ["gsm8k_cot", "piqa", "gsm8k"]
    assert found[1].metric is None and found[2].metric == ("exact_match", "strict-match")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "runs what --tasks names"),
        (("--tasks", "gsm9k"), "unknown task 'gsm9k': did you mean gsm8k?"),
        (("--tasks", "none.yaml"), "cannot read the task none.yaml"),
        (("--tasks", "gsm8k", "--policy", "random"), "by alpha_high and alpha_low: paper"),
        (("--tasks", "gsm8k", "--limit", "0"), "--limit must be at least 1"),
        (("--tasks", "gsm8k", "--settings", "hard"), "--settings is for --suite synth"),
    ],
)
def test_refusals(capsys, arguments, message):
    assert main(["eval", "--suite", "lm-eval", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("flag", ["--thinking", "--run-code", "--max-model-len"])
def test_other_suites_refuse_what_is_not_theirs(capsys, flag):
    assert main(["eval", "--suite", "kld", flag]) == 2
    assert flag in capsys.readouterr().err
