"""Every `diffkv bench` runs, and its rows say what they should."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffkv.lab import rows
from diffkv.lab.bench.child import Child, in_turn
from diffkv.lab.bench.engine import Job, _drive
from diffkv.lab.rows import Row

TIMEOUT_SECONDS = 900


def bench(folder: Path, *arguments: str) -> list[Row]:
    """The rows of a smoke run; those that it prints are those of its file."""
    out = folder / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "diffkv", "bench", *arguments, "--smoke", "--json", "--out", out],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == out.read_text()
    found = rows.read(out)
    assert all(row.provenance.vllm and row.provenance.threads for row in found)
    return found


def test_attention(tmp_path: Path) -> None:
    found = bench(tmp_path, "attention")
    kernels = {(row["engine"], row["quant"], row.get("tiers")) for row in found}
    assert kernels >= {
        ("stock bf16", "bf16", None),
        ("diffkv", "k16v16", "high"),
        ("diffkv", "k8v8-k4v2", "mix"),
    }
    for row in found:
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["gb_per_s"] * row["ms"] * 1e6 == pytest.approx(row["bytes"])
    worst = {
        name: max(row["relative_error"] for row in found if row["quant"] == name)
        for name in ("bf16", "k16v16", "k8v4")
    }
    assert worst["bf16"] < 0.01
    assert worst["k16v16"] < 0.01
    assert 0.01 < worst["k8v4"] < 0.2


def test_manager(tmp_path: Path) -> None:
    found = bench(tmp_path, "manager")
    operations = {row["op"] for row in found if row.kind == "pool"}
    assert operations == {
        "plan_decode",
        "append",
        "significance",
        "store_prompt",
        "gather",
        "release",
        "release one",
    }
    (overhead, *_) = [row for row in found if row.kind == "overhead"]
    assert overhead["overhead"] <= 0.05


def test_throughput(tmp_path: Path) -> None:
    stock, ours = bench(tmp_path, "throughput", "--quant", "k8v4-k4v2")
    assert (stock["engine"], ours["engine"]) == ("stock bf16", "diffkv")
    # The default budget holds four requests of bf16, and all six of ours.
    assert (stock["max_running"], ours["max_running"]) == (4, 6)
    assert ours["bytes_per_token"] < stock["bytes_per_token"] / 2
    assert ours["vs_stock_bf16"] == ours["tokens_per_s"] / stock["tokens_per_s"]


def test_map(tmp_path: Path) -> None:
    *found, short, long = bench(tmp_path, "map", "--quant", "k8v4-k4v2")
    cells = [(row["ctx"], row["requests"], row["engine"]) for row in found]
    assert cells == [
        (ctx, requests, engine)
        for ctx in (64, 260)
        for requests in (1, 6)
        for engine in ("stock bf16", "diffkv")
    ]
    for stock, ours in zip(found[::2], found[1::2], strict=True):
        assert ours["decode_vs_stock_bf16"] == pytest.approx(
            ours["decode_tokens_per_s"] / stock["decode_tokens_per_s"]
        )
        assert ours["runs"] >= 1
    for row, ctx in ((short, 64), (long, 260)):
        assert (row.kind, row["ctx"]) == ("prompt", ctx)
        assert row["significance_ms"] > 0
    stock, ours = found[-2:]
    # The budget holds four of the longest requests in bf16, and all six of ours.
    assert (stock["max_running"], ours["max_running"]) == (4, 6)
    assert ours["bytes_per_token"] < stock["bytes_per_token"] / 2


def test_agent(tmp_path: Path) -> None:
    """Without loss, tokens over turns equal vLLM's; engines find most of a prompt in their caches."""
    check, *found = bench(tmp_path, "agent")
    assert (check.kind, check["quant"], check["equal"]) == ("agent_check", "k16v16", True)
    assert (check["tokens"], check["dtype"]) == (3 * 3 * 8, "float32")
    stock, ours = found
    assert [row["engine"] for row in found] == ["stock bf16", "diffkv"]
    assert check["stock_hit_rate"] == stock["hit_rate"] > 0.6
    assert min(check["hit_rate"], ours["hit_rate"]) > 0.6
    for row in found:
        assert row["prompt_tokens_by_turn"] == [690, 788, 886]
        assert len(row["p95_ttft_ms_by_turn"]) == 3
        assert 0 < row["p50_ttft_ms"] <= row["p95_ttft_ms"]
        assert row["max_running"] == 3
    # Of the first turn nothing is known but the system prompt, once somebody has computed it
    assert stock["cached_share_by_turn"][0] < 0.6 < stock["cached_share_by_turn"][2]
    assert ours["cached_share_by_turn"][2] > 0.6
    assert stock["bytes_per_token"] == pytest.approx(3 * 2 * 2 * 64 * 2, rel=0.01)
    assert ours["bytes_per_token"] < stock["bytes_per_token"] / 2
    assert ours["vs_stock_bf16"] == ours["tokens_per_s"] / stock["tokens_per_s"]


class RunsAhead:
    """A scheduler and an engine that fetch a step's output after the next step was launched."""

    LAUNCH_SECONDS = 0.05

    def __init__(self) -> None:
        self.request = SimpleNamespace(num_computed_tokens=0, num_tokens=10)
        self.requests = {"0-0": self.request}
        self.running = [self.request]
        pool = SimpleNamespace(num_gpu_blocks=9, get_num_free_blocks=lambda: 4)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self))
        self.llm_engine = self
        self.queue: list[object] = [object()]  # left over from the run before

    def add_request(self, name: str, *_: object) -> None:
        assert name in self.requests

    def has_unfinished_requests(self) -> bool:
        return bool(self.queue)

    def schedule(self) -> object:
        tokens = 1 if self.request.num_computed_tokens else 10
        self.request.num_computed_tokens += tokens
        return SimpleNamespace(num_scheduled_tokens={"0-0": tokens})

    def update_from_output(self, _: object) -> None:
        self.request.num_tokens += 1

    def step(self) -> list[object]:
        if self.request.num_computed_tokens < 11:
            self.queue.append(self.schedule())
            time.sleep(self.LAUNCH_SECONDS)
        self.update_from_output(self.queue.pop(0))
        return []


def test_a_step_left_over_takes_no_time_from_the_first() -> None:
    steps, seconds, _ = _drive(RunsAhead(), ([[[1] * 10]], [2]))
    assert (steps.prefill_tokens, steps.decode_tokens, steps.decode_steps) == (10, 1, 1)
    assert (
        steps.prefill_seconds > 2 * RunsAhead.LAUNCH_SECONDS
    )  # its own launch, and the next one's
    assert steps.prefill_seconds + steps.decode_seconds <= seconds


def test_an_engine_that_cannot_start_says_why() -> None:
    job = Job({"model": "/no/such/model"}, None, 1 << 20, [([[[1]]], [1])])
    with Child(job) as child:
        first, second = child.run(0), child.run(0)
    assert "/no/such/model" in first["error"]
    assert second == first
    assert in_turn([job], print) == [[{"runs": 1, **first}]]


def test_serving(tmp_path: Path) -> None:
    options = ("--goodput", "ttft:60000", "--request-alpha-high", "2")
    (row,) = bench(tmp_path, "serving", *options)
    assert (row["completed"], row["failed"]) == (4, 0)
    assert row["extra_body"] == {"vllm_xargs": {"diffkv_alpha_high": 2.0}}
    assert 0 < row["p50_ttft_ms"] <= row["p95_ttft_ms"] <= row["p99_ttft_ms"]
    assert row["request_goodput"] > 0
