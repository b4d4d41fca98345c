"""The laboratory's shared modules: provenance, rows, pages, plots, timing."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import diffkv
from diffkv.lab import page, plots, provenance, rows, timing
from diffkv.lab.page import Page
from diffkv.lab.provenance import Provenance
from diffkv.quant import ConfigError

HERE = Provenance(
    "diffkv bench attention",
    "Some CPU",
    "0.1.0",
    "2.13.0",
    "2030-01-02",
    "abc-dirty",
    "0.32.0",
    cores=2,
    threads=1,
)


def test_provenance_of_this_process():
    here = provenance.collect()
    assert here.diffkv == diffkv.__version__
    assert here.torch == torch.__version__
    assert here.threads == torch.get_num_threads()
    assert here.cores >= 1
    assert Provenance.parse(json.loads(json.dumps(here.to_json()))) == here


def test_provenance_in_words():
    assert HERE.machine == "Some CPU, 2 cores, 1 thread"
    assert HERE.software == "DiffKV 0.1.0 at abc-dirty, vLLM 0.32.0, torch 2.13.0, 2030-01-02"
    bare = Provenance("c", "Some GPU", "0.1.0", "2.13.0")
    assert bare.machine == "Some GPU"
    assert bare.software == "DiffKV 0.1.0, torch 2.13.0"


@pytest.fixture(name="checkout")
def _checkout(tmp_path, monkeypatch):
    """A repository with the module in it, and one document."""
    source, document = tmp_path / "provenance.py", tmp_path / "docs" / "page.md"
    document.parent.mkdir()
    for path in (source, document):
        path.write_text("1\n")
    monkeypatch.setattr(provenance, "__file__", str(source))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert provenance.commit() is None  # the module is not tracked: it is installed here
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return source, document, head.stdout.strip()


def test_commit_says_that_sources_were_changed(checkout):
    source, document, head = checkout
    assert provenance.commit() == head[: provenance.COMMIT_LENGTH]
    document.write_text("2\n")
    assert provenance.commit() == head[: provenance.COMMIT_LENGTH]
    source.write_text("2\n")
    assert provenance.commit() == head[: provenance.COMMIT_LENGTH] + "-dirty"


def test_rows_come_back(tmp_path, capsys):
    path = tmp_path / "deep" / "rows.jsonl"
    writer = rows.Writer(HERE, path)
    first = writer.add("attention", {"ctx": 1, "batch": 2}, {"ms": 0.5}, "0.5 ms")
    second = writer.add("attention", {"ctx": 2}, {}, error="no memory")
    assert rows.read(path) == writer.rows == [first, second]
    assert (first["ctx"], first["ms"], first.get("p99")) == (1, 0.5, None)
    assert second.error == "no memory"
    assert capsys.readouterr().out == "0.5 ms\n"


def test_json_lines_are_all_that_goes_to_standard_output(capsys):
    writer = rows.Writer(HERE, as_json=True)
    row = writer.add("attention", {"ctx": 1}, {"ms": 0.5}, "0.5 ms")
    writer.note("a note")
    printed = capsys.readouterr()
    assert rows.Row.parse(printed.out) == row
    assert printed.err == "a note\n"


def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    writer = rows.Writer(HERE, path)
    done = writer.add("attention", {"ctx": 1, "batch": 2}, {"ms": 0.5})
    failed = writer.add("attention", {"ctx": 2}, {}, error="no memory")
    with path.open("a") as file:
        file.write('{"kind": "attent')
    again = rows.Writer(HERE, path, resume=True)
    assert again.rows == [done, failed]
    assert again.find("attention", {"batch": 2, "ctx": 1}) == done
    assert again.find("pool", {"batch": 2, "ctx": 1}) is None
    assert again.find("attention", {"ctx": 2}) is None
    added = again.add("attention", {"ctx": 2}, {"ms": 0.7})
    assert again.find("attention", {"ctx": 2}) == added
    assert rows.read(path) == [done, failed, added]
    assert rows.Writer(HERE, path).rows == []


GOOD = rows.Row("k", {"a": 1}, {"b": 2.0}, HERE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", "line 2: a row must be an object, got list"),
        ('{"kind": "k"}', "line 2: a row lacks case"),
        (GOOD.to_json().replace('"kind"', '"sort"'), "line 2: a row has no field sort"),
        (GOOD.to_json().replace('{"a": 1}', "[1]"), r"line 2: case must be dict, got \[1\]"),
        (GOOD.to_json().replace('"b"', '"a"'), "line 2: a is both in case and in measured"),
        (GOOD.to_json().replace('"device"', '"place"'), "line 2: provenance has no field place"),
        (GOOD.to_json().replace('"cores": 2', '"cores": "2"'), "cores must be int, got '2'"),
        (replace(GOOD, provenance=replace(HERE, torch=None)).to_json(), "provenance lacks torch"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD.to_json()}\n{line}\n\n")
    with pytest.raises(ConfigError, match=message):
        rows.read(path)
    with pytest.raises(ConfigError, match=message):
        rows.Writer(HERE, path, resume=True)


def test_no_row_without_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    writer = rows.Writer(HERE, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.add("k", {}, {"ms": float("nan")})
    assert path.read_text() == "" and writer.rows == []
    with pytest.raises(ConfigError, match="cannot read"):
        rows.read(tmp_path / "none.jsonl")


def test_page(tmp_path):
    path = tmp_path / "page" / "README.md"
    made = Page("Figures")
    made.heading("One")
    made.sources([GOOD, GOOD])
    columns = [
        ("name", lambda row: "a|b"),
        ("b", lambda row: page.number(row["b"], 2)),
        ("c", lambda row: page.number(row.get("c"))),
    ]
    made.table(columns, [GOOD])
    made.failures([GOOD, replace(GOOD, error="no memory")], lambda row: row.kind)
    made.plot("plot.png", "a plot")
    made.write(path)
    assert path.read_text() == (
        "# Figures\n\n## One\n\n```\ndiffkv bench attention\n```\n\n"
        "Some CPU, 2 cores, 1 thread; DiffKV 0.1.0 at abc-dirty, vLLM 0.32.0, torch 2.13.0, "
        "2030-01-02.\n\n"
        "| name | b |\n| --- | ---: |\n| a\\|b | 2.00 |\n\n"
        "Did not run:\n\n* k: no memory\n\n![a plot](plot.png)\n"
    )


def test_numbers_in_words():
    assert page.number(12345.67) == "12,345.7"
    assert page.percent(0.125) == "12.5%"
    assert page.times(2) == "2.00x"
    assert {page.number(None), page.percent(None), page.times(None)} == {"—"}


def test_plots_are_drawn(tmp_path):
    """Each kind gives a picture of its size whose pixels are not all alike."""
    image = pytest.importorskip("PIL.Image", reason="needs the extra plot")
    panel = plots.Lines("a", "x", "y", {"one": [(2, 1), (1, 3)], "two": [(1, 1)]}, "xy")
    bar = {"first": plots.Bar(1.0, 0.5, 1.5), "second": plots.Bar(2.0)}
    share = plots.HeatMap("s", "x", "y", ["a"], ["b", "c"], {(0, 0): 0.5, (1, 0): 0.2})
    ratio = replace(share, cells={(1, 0): 2.5}, colours="ratio")
    plots.lines(tmp_path / "lines.png", [panel, panel])
    plots.pareto(
        tmp_path / "pareto.png",
        "t",
        "x",
        "y",
        [plots.Point("a", 1, 2, 1, 3), plots.Point("b", 2, 1, 0, 2)],
        full=4,
    )
    plots.bars(tmp_path / "bars.png", "t", "y", {"s": bar, "r": {"second": bar["second"]}})
    plots.heat_maps(tmp_path / "share.png", [[share, share]], "title")
    plots.heat_maps(tmp_path / "ratio.png", [[ratio], [ratio, ratio]])
    for name in ("lines", "pareto", "bars", "share", "ratio"):
        drawn = image.open(tmp_path / f"{name}.png")
        assert min(drawn.size) >= 150
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 10


def test_plots_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'diffkv\[plot\]'"):
        plots.require()


def test_timing_is_median_and_percentiles():
    values = [float(n) for n in range(11)]
    assert timing.Timing.of(values[::-1]) == timing.Timing(5.0, 2.0, 8.0)


def test_cases_run_in_turn():
    order = []
    cases = [timing.Case(name, lambda n=name: order.append(n), 1) for name in "ab"]
    timings = timing.measure(cases, repeats=3)
    assert "".join(order) == "ab" * (timing.WARM_UP + 3)
    assert all(0 <= t.p20 <= t.ms <= t.p80 for t in timings)


def test_warm_cases_are_called_before_and_timed_by_the_clock():
    order = []
    ticks = iter(range(100))
    (found,) = timing.measure(
        [timing.Case("a", lambda: order.append("a"), 1)], 3, clock=lambda: next(ticks), warm=True
    )
    assert len(order) == 2 * (timing.WARM_UP + 3)
    assert found == timing.Timing(1e3, 1e3, 1e3)


def test_stopwatch_leaves_first_calls_out(monkeypatch):
    ticks = iter([0, 9, 9, 18, 18, 19, 20, 23])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    watch = timing.Stopwatch("cpu")
    assert [watch.time("a", lambda n=n: n) for n in range(3)] == [0, 1, 2]
    watch.time("once", lambda: None)
    assert {name: each.ms for name, each in watch.timings().items()} == {"a": 1e3, "once": 3e3}


def test_stream_case_moves_what_it_says():
    case = timing.stream_case("cpu")
    assert case.num_bytes >= timing.MIN_FLUSH_BYTES["cpu"]
    assert case.run() == case.num_bytes // 4
    assert timing.peak_gb_per_s("cpu") is None


class FakeCuda:
    """Streams, events and graphs of torch.cuda on a CPU; a graph's time is how often it ran."""

    def __init__(self, monkeypatch):
        self.ticks, self.recording = 0, None
        monkeypatch.setattr(timing, "_flush_buffer", lambda device: torch.ones(8))
        for name, fake in {
            "CUDAGraph": lambda: self.Graph(self),
            "graph": self.graph,
            "Event": lambda enable_timing: self.Event(self),
            "synchronize": lambda: None,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": contextlib.nullcontext,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextlib.contextmanager
    def graph(self, graph):
        self.recording = graph
        yield
        self.recording = None

    def launch(self, work):
        """What a kernel's launch is: work, or a line in the graph that is recorded."""
        if self.recording is not None:
            self.recording.work.append(work)
        else:
            self.ticks += 1
            work()

    class Graph:
        def __init__(self, cuda):
            self.cuda, self.work = cuda, []

        def replay(self):
            for work in self.work:
                self.cuda.launch(work)

    class Event:
        def __init__(self, cuda):
            self.cuda = cuda

        def record(self):
            self.at = self.cuda.ticks

        def elapsed_time(self, end):
            return float(end.at - self.at)


@pytest.fixture(name="cuda")
def _cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_on_gpus_cases_run_from_graphs(cuda):
    calls, work = [], []

    def case(name, launches):
        def run():
            calls.append(name)
            for _ in range(launches):
                cuda.launch(lambda: work.append(name))

        return timing.Case(name, run, 1)

    one, three = timing.measure([case("a", 1), case("b", 3)], repeats=5, device="cuda")
    assert (one.ms, three.ms) == (1.0, 3.0)
    assert calls.count("a") == timing.WARM_UP + 1  # the last of them is recorded
    assert work.count("a") == timing.WARM_UP + timing.WARM_UP + 5
    assert work[-4:] == ["a", "b", "b", "b"]


def test_on_gpus_a_stopwatch_runs_each_part_once(cuda):
    watch, done = timing.Stopwatch("cuda"), []

    def part(number):
        cuda.launch(lambda: done.append(number))
        return number

    assert [watch.time("part", lambda n=n: part(n)) for n in range(5)] == [0, 1, 2, 3, 4]
    assert done == [0, 1, 2, 3, 4]
    assert watch.timings()["part"] == timing.Timing(1.0, 1.0, 1.0)


def test_the_streaming_copy_copies():
    """By Triton's interpreter, which must be chosen before Triton is imported."""
    pytest.importorskip("triton", reason="needs triton")
    code = (
        "import torch; from diffkv.lab.stream import BLOCK, copy; "
        "x = torch.randn(2 * BLOCK); y = torch.zeros_like(x); copy(x, y); "
        "assert torch.equal(x, y) and x.abs().sum() > 0"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
