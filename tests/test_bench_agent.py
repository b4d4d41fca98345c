"""Parts of `diffkv bench agent` that need no engine; tests/vllm_plugin has a run of the command."""

import json
import sys
from dataclasses import asdict, replace

import pytest

from diffkv.cli import bench_agent, main
from diffkv.lab.bench import agent, child, pages
from diffkv.lab.bench.agent import Chats
from diffkv.lab.bench.conversation import Conversation, by_turn
from diffkv.lab.bench.engine import Job
from diffkv.lab.page import Page
from diffkv.lab.provenance import Provenance
from diffkv.lab.rows import Row, Writer, read
from diffkv.quant import ConfigError

HERE = Provenance("diffkv bench agent", "Some CPU", "0.1.0", "2.13.0")
SMALL = Chats(conversations=2, turns=3, system_len=5, turn_len=2, answer_len=1)
ANSWERS = [[[1], [2], [3]], [[1], [2], [3]]]


def test_a_conversation_grows_by_answers_and_new_tokens():
    mine = Conversation([[1, 2], [3], [4, 5]], 2)
    assert mine.ask(10.0) == [1, 2]
    with pytest.raises(AssertionError, match="under way"):
        mine.ask(10.0)
    mine.hear([], False, 0, 10.1)
    mine.hear([7], False, 0, 10.5)
    mine.hear([8], True, 0, 11.0)
    assert mine.ask(11.0) == [1, 2, 7, 8, 3]
    mine.hear([9, 9], True, 4, 11.25)
    assert not mine.is_over
    assert mine.ask(20.0) == [1, 2, 7, 8, 3, 9, 9, 4, 5]
    mine.hear([6], False, 5, 20.125)
    mine.hear([6], True, 0, 20.5)
    assert mine.is_over
    assert mine.answers == [[7, 8], [9, 9], [6, 6]]
    assert (mine.waited, mine.cached, mine.prompt_lens) == (
        [0.5, 0.25, 0.125],
        [0, 4, 5],
        [2, 5, 9],
    )


def test_figures_of_conversations_by_turn():
    conversations = [
        Conversation([[0], [0]], 1, prompt_lens=[10, 20], cached=[0, 10], waited=[0.1, 0.2]),
        Conversation([[0], [0]], 1, prompt_lens=[10, 20], cached=[5, 20], waited=[0.3, 0.4]),
    ]
    found = by_turn(conversations)
    assert json.loads(json.dumps(found)) == found
    assert found["mean_ttft_ms"] == pytest.approx(250)
    assert found["p50_ttft_ms"] == pytest.approx(250)
    assert found["mean_ttft_ms_by_turn"] == pytest.approx([200, 300])
    assert found["p95_ttft_ms_by_turn"] == pytest.approx([290, 390])
    assert found["prompt_tokens_by_turn"] == [10, 20]
    assert found["cached_share_by_turn"] == pytest.approx([0.25, 0.75])


def test_conversations_share_the_system_prompt_alone():
    assert (SMALL.longest, SMALL.num_given) == (14, 17)
    chats, lengths = SMALL.load(range(SMALL.num_given))
    assert chats == [
        [[0, 1, 2, 3, 4, 5, 6], [7, 8], [9, 10]],
        [[0, 1, 2, 3, 4, 11, 12], [13, 14], [15, 16]],
    ]
    assert lengths == [1, 1]
    assert SMALL.load(range(SMALL.num_given), 99)[0] == [
        [[0, 1, 2, 3, 99, 5, 99], [7, 99], [9, 99]],
        [[0, 1, 2, 3, 99, 11, 99], [13, 99], [15, 99]],
    ]
    random = SMALL.random_load(512)
    assert random == SMALL.random_load(512)
    assert random != SMALL.random_load(512, seed=1)


def test_the_trace_fits_the_bundled_model_when_scaled():
    default = agent.TRACE.scaled(bench_agent.SCALE)
    assert asdict(default) == {
        "conversations": 8, "turns": 30, "system_len": 600, "turn_len": 95, "answer_len": 18,
    }  # fmt: skip
    assert default.longest < 4096
    assert agent.TRACE.scaled(1) == agent.TRACE
    assert 79_000 < agent.TRACE.longest < 81_000


def test_engines_with_prefix_caching_and_without():
    settings = agent.compared(["bf16", "fp8", "k8v4"], ["bf16", "k8v4"], [{"quant": "k8v4"}])
    assert [setting.label for setting in settings] == [
        "stock bf16",
        "stock fp8",
        "diffkv k8v4",
        "stock bf16, no prefix caching",
        "diffkv k8v4, no prefix caching",
    ]
    assert settings[1].engine == {"enable_prefix_caching": True, "kv_cache_dtype": "fp8"}
    assert settings[-1].case == {"engine": "diffkv", "quant": "k8v4", "prefix_caching": False}


def figures(factor):
    """What an engine of a speed finds."""
    rates = dict.fromkeys(("tokens_per_s", "decode_tokens_per_s"), 10.0 * factor)
    times = {f"{name}_ttft_ms": 6.0 / factor for name in ("mean", "p50", "p95")}
    counts = {"seconds": 3.0 / factor, "hit_rate": 0.9, "max_running": 2, "preemptions": 0}
    lists = {
        "p50_ttft_ms_by_turn": [9.0 / factor, 6.0 / factor, 3.0 / factor],
        "prompt_tokens_by_turn": [7.0, 10.0, 13.0],
    }
    return {**rates, **times, **counts, **lists, "bytes_per_token": 100.0}


class FakeChild:
    """An engine: DiffKV is twice as fast as vLLM's cache, and prefix caching halves the time."""

    ours = ANSWERS

    def __init__(self, job):
        self.job = job

    def run(self, cell):
        engine, is_ours = self.job.engine, self.job.options is not None
        if engine.get("kv_cache_dtype") == "fp8":
            return {"error": "no fp8 here"}
        assert self.job.turns and (engine["max_model_len"], engine["max_num_seqs"]) == (15, 2)
        found = figures(
            (2.0 if is_ours else 1.0) * (1.0 if engine["enable_prefix_caching"] else 0.5)
        )
        if self.job.answers:
            assert engine["dtype"] == "float32"
            found["answers"] = self.ours if is_ours else ANSWERS
        return found


def fake_rounds(jobs, rounds, apart, say):
    return [[[FakeChild(job).run(0)]] * rounds for job in jobs]


def run_with_fakes(monkeypatch, writer, caches=("bf16", "fp8", "k8v4"), without=("bf16",)):
    monkeypatch.setattr(agent, "in_rounds", fake_rounds)
    ours = [{"quant": "k8v4"}] if "k8v4" in caches else []
    settings = agent.compared(caches, without, ours)
    load = SMALL.random_load(512)
    return agent.run({}, SMALL, load, [10**7, 10**6], settings, (2, False), writer, {"model": "m"})


def test_from_engines_to_rows(monkeypatch, capsys):
    writer = Writer(HERE)
    rows = run_with_fakes(monkeypatch, writer)
    assert rows == writer.rows and len(rows) == 2 * 4
    stock, fp8, ours, without = rows[:4]
    assert stock.case == {
        "model": "m",
        "engine": "stock bf16",
        "quant": "bf16",
        "prefix_caching": True,
        "kv_bytes": 10**7,
        **asdict(SMALL),
        "repeats": 2,
    }
    assert fp8.error == "no fp8 here"
    # Ratios are to vLLM with prefix caching, and above 1 where DiffKV is faster
    assert (ours["vs_stock_bf16"], ours["ttft_vs_stock_bf16"]) == (2.0, 2.0)
    assert (without["vs_stock_bf16"], without["ttft_vs_stock_bf16"]) == (0.5, 0.5)
    assert ours["p50_ttft_ms_by_turn"] == [4.5, 3.0, 1.5]
    printed = capsys.readouterr().out
    assert "stock fp8              did not run: no fp8 here" in printed
    assert "2.00x of bf16, first token 2.00x, decoding 2.00x" in printed
    assert "at turn (tokens of its prompt) 1 (7), 2 (10), 3 (13):" in printed
    with pytest.raises(ConfigError, match="no engine could run: no fp8 here"):
        run_with_fakes(monkeypatch, Writer(HERE), ["fp8"], [])


def test_medians_of_lists_are_by_place():
    runs = [{"a": 1.0, "b": [1.0, 9.0]}, {"a": 2.0, "b": [3.0, 7.0]}, {"a": 9.0, "b": [2.0, 8.0]}]
    assert child.medians(runs) == {"a": 2.0, "b": [2.0, 8.0]}
    assert child.medians([*runs, {"error": "gone"}]) == {"error": "gone"}


ENDS_WITH_THE_OTHER = """
import json, os, sys, time
from pathlib import Path
from diffkv.lab.bench.engine import ANSWER
folder = Path(json.loads(sys.stdin.readline())["engine"]["model"])
print(ANSWER + "{}", flush=True)
for _ in sys.stdin:
    print(ANSWER + json.dumps({"seconds": 9.0}), flush=True)
(folder / str(os.getpid())).touch()
until = time.monotonic() + 60
while len(list(folder.iterdir())) < 2 and time.monotonic() < until:
    time.sleep(0.01)
(folder / ("alone" if len(list(folder.iterdir())) < 2 else "together")).touch()
"""


def test_engines_end_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", ENDS_WITH_THE_OTHER))
    jobs = [Job({"model": str(tmp_path)}, None, 1, [([[[1]]], [1])])] * 2
    assert child.in_turn(jobs, print) == [[{"runs": 1, "seconds": 9.0}]] * 2
    assert not (tmp_path / "alone").exists() and (tmp_path / "together").exists()


def check_with_fakes(monkeypatch, answers, writer):
    monkeypatch.setattr(agent, "started", lambda stack, jobs: [FakeChild(job) for job in jobs])
    monkeypatch.setattr(FakeChild, "ours", answers)
    load = SMALL.random_load(512)
    options = {"quant": agent.EXACT}
    return agent.check({}, SMALL, load, 10**6, options, writer, {"model": "m"})


def test_check_of_tokens(monkeypatch, capsys):
    writer = Writer(HERE)
    assert check_with_fakes(monkeypatch, ANSWERS, writer)
    assert "k16v16 in float32 gives vLLM's 6 tokens (hits 90.0%, vLLM's 90.0%)" in (
        capsys.readouterr().out
    )
    assert not check_with_fakes(monkeypatch, [[[1], [2], [3]], [[1], [7], [3]]], writer)
    assert "from turn 2, token 1 of conversation 2 on" in capsys.readouterr().out
    assert [row["equal"] for row in writer.rows] == [True, False]


def test_status_is_1_if_tokens_are_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(agent, "check", lambda *_: False)
    monkeypatch.setattr(agent, "run", lambda *_: [])
    assert main(["bench", "agent", "--check", "--out", str(tmp_path / "rows.jsonl")]) == 1
    assert main(["bench", "agent", "--out", str(tmp_path / "rows.jsonl")]) == 0


def test_report_of_conversations(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    file = tmp_path / "rows.jsonl"
    writer = Writer(HERE, file)
    check_with_fakes(monkeypatch, ANSWERS, writer)
    run_with_fakes(monkeypatch, writer)
    assert [row.to_json() for row in read(file)] == [row.to_json() for row in writer.rows]
    assert main(["report", str(file), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "m, 2 conversations of 3 turns over one system prompt of 5 tokens, to 14 tokens:" in text
    assert "| stock bf16, no prefix caching | 10.0 | 6.0 | 5.0 (5.0 to 5.0) | 90.0% |" in text
    assert "| k16v16 | 6 | all | 90.0% | 90.0% |" in text
    assert "* stock fp8: no fp8 here" in text
    assert (tmp_path / "agent.png").stat().st_size > 2000


def test_a_page_of_conversations_without_plots(monkeypatch, tmp_path):
    writer = Writer(HERE)
    run_with_fakes(monkeypatch, writer)
    page = Page("Agents")
    assert pages.add_sections(page, writer.rows, tmp_path, with_plots=False) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--cache k3v3", "--cache takes bf16, fp8 and formats such as k8v8-k4v2: k_bits must be"),
        ("--cache bf16 --uncached nothing", "--cache takes bf16, fp8 and formats such as"),
        ("--cache ,", "--cache names no cache: take bf16, fp8 or formats such as k8v8-k4v2"),
        ("--turns 0", "--turns must be at least 1, got 0"),
        ("--conversations many", "--conversations must be a whole number, got many"),
        ("--system-len 0", "--system-len must be a whole number of at least 1"),
        ("--kv-bytes 0K", "--kv-bytes must be bytes or a number with a unit"),
        ("--alpha-high -1", "alpha_high"),
        ("--segment 8", "segment must be 0, or at least the window"),
        ("--text /no/such/file", "cannot read --text /no/such/file"),
        ("--model /no/such/folder", "model folder /no/such/folder does not exist"),
        ("--scale 1", "--scale 1: conversations grow to 79,500 tokens, and the model takes 4,096"),
    ],
)
def test_refuses_in_one_line(capsys, command, message):
    assert main(["bench", "agent", *command.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_text_that_is_too_short(capsys, tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    assert main(["bench", "agent", "--text", str(tmp_path / "short.txt")]) == 2
    assert "has 3 tokens, and the conversations take 23,400: take" in capsys.readouterr().err


def test_a_row_without_a_list_is_refused_by_name(tmp_path):
    row = Row("agent", {"engine": "stock bf16"}, {"seconds": 1.0}, HERE)
    with pytest.raises(ConfigError, match="a row of kind agent has no prompt_tokens_by_turn"):
        pages.add_sections(Page("Agents"), [replace(row)], tmp_path, with_plots=False)
