"""Every `diffkv bench` runs, and its rows say what they should."""

import json
import subprocess
import sys
from typing import Any

import pytest

from diffkv.lab.bench.child import Child, in_turn
from diffkv.lab.bench.engine import Job

TIMEOUT_SECONDS = 300
FACTS = {"device", "diffkv", "torch", "vllm", "python", "commit"}


def bench(*arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "diffkv", "bench", *arguments, "--smoke", "--json"],
        capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(set(row) >= FACTS for row in rows)
    return rows


def test_attention() -> None:
    rows = bench("attention")
    kernels = {(row["quant"], row["tiers"]) for row in rows}
    assert kernels >= {("bf16", None), ("k16v16", "high"), ("k8v4-k4v2", "mix")}
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["gb_per_s"] * row["ms"] * 1e6 == pytest.approx(row["bytes"])
    worst = {name: max(r["relative_error"] for r in rows if r["quant"] == name) for name in
             ("bf16", "k16v16", "k8v4")}  # fmt: skip
    assert worst["bf16"] < 0.01
    assert worst["k16v16"] < 0.01
    assert 0.01 < worst["k8v4"] < 0.2


def test_manager() -> None:
    rows = bench("manager")
    operations = {row["op"] for row in rows if "ms" in row}
    assert operations >= {"plan_decode", "append", "significance", "store_prompt", "gather",
                          "release", "host numpy", "host python"}  # fmt: skip
    (overhead, *_) = [row for row in rows if row["op"] == "overhead"]
    assert overhead["overhead"] <= 0.05


def test_throughput() -> None:
    stock, ours = bench("throughput", "--quant", "k8v4-k4v2")
    assert (stock["engine"], ours["engine"]) == ("stock bf16", "diffkv")
    # The default budget holds four requests of bf16, and all six of ours.
    assert (stock["max_running"], ours["max_running"]) == (4, 6)
    assert ours["bytes_per_token"] < stock["bytes_per_token"] / 2
    assert ours["vs_stock_bf16"] == ours["tokens_per_s"] / stock["tokens_per_s"]


def test_map() -> None:
    *rows, short, long = bench("map", "--quant", "k8v4-k4v2")
    cells = [(row["ctx"], row["requests"], row["engine"]) for row in rows]
    assert cells == [(ctx, requests, engine) for ctx in (64, 260) for requests in (1, 6)
                     for engine in ("stock bf16", "diffkv")]  # fmt: skip
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours["decode_vs_stock_bf16"] == pytest.approx(
            ours["decode_tokens_per_s"] / stock["decode_tokens_per_s"]
        )
        assert ours["runs"] >= 1
    for row, ctx in ((short, 64), (long, 260)):
        assert (row["op"], row["ctx"]) == ("prompt", ctx)
        assert row["significance_ms"] > 0
    stock, ours = rows[-2:]
    # The budget holds four of the longest requests in bf16, and all six of ours.
    assert (stock["max_running"], ours["max_running"]) == (4, 6)
    assert ours["bytes_per_token"] < stock["bytes_per_token"] / 2


def test_an_engine_that_cannot_start_says_why() -> None:
    job = Job({"model": "/no/such/model"}, None, 1 << 20, [([[1]], [1])])
    with Child(job) as child:
        first, second = child.run(0), child.run(0)
    assert "/no/such/model" in first["error"]
    assert second == first
    assert in_turn([job], print) == [[{"runs": 1, **first}]]


def test_serving() -> None:
    (row,) = bench("serving", "--goodput", "ttft:60000", "--request-alpha-high", "2")
    assert (row["completed"], row["failed"]) == (4, 0)
    assert row["extra_body"] == {"vllm_xargs": {"diffkv_alpha_high": 2.0}}
    assert 0 < row["p50_ttft_ms"] <= row["p95_ttft_ms"] <= row["p99_ttft_ms"]
    assert row["request_goodput"] > 0
