"""Parts of `diffkv bench` that need no engine; tests/vllm_plugin has runs of the commands."""

import argparse
import contextlib
import itertools
import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from diffkv import ops
from diffkv.cli import main
from diffkv.cli.bench import add_arguments, run
from diffkv.lab import timing
from diffkv.lab.bench import (
    attention,
    child,
    fill,
    models,
    pages,
    pool,
    prompt,
    serving,
    sweep,
    throughput,
)
from diffkv.lab.bench.attention import Grid, Point
from diffkv.lab.bench.stock import Checked, dense_attention, stock_cases
from diffkv.lab.page import Page
from diffkv.lab.provenance import Provenance
from diffkv.lab.rows import Row, Writer
from diffkv.lab.timing import Case
from diffkv.quant import ConfigError

HERE = Provenance("diffkv bench", "Some CPU", "0.1.0", "2.13.0")


def test_exponent_of_a_power_law():
    sizes = [1, 4, 16, 64]
    assert pool.exponent(sizes, [3 * size**0.5 for size in sizes]) == pytest.approx(0.5)


def test_grid_has_no_ragged_batch_of_one():
    grid = Grid(["k8v4"], ["high"], [1024], [1, 8], [4, 8], [False, True])
    points = list(grid.points())
    assert len(points) == 2 * 2 + 2
    assert len(set(map(str, points))) == len(points)
    assert sum(Point(1024, 8, 4, True).lengths()) == pytest.approx(8 * 1024, abs=8)


def test_kept_tokens_are_counted_by_tier():
    state = fill.make_pool("k8v4-k4v2", 64, torch.bfloat16, (1, 2), 2, 300)
    tokens = fill.random_tokens([300, 100], 2, 64, torch.bfloat16, "cpu")
    fill.fill(state, ops.load("cpu"), tokens, high_share=0.0)
    assert fill.kept_tokens(state, 0) == [2 * 2 * state.window, 2 * (400 - 2 * state.window)]
    single = fill.make_pool("k8v4", 64, torch.bfloat16, (1, 2), 2, 300)
    fill.fill(single, ops.load("cpu"), tokens, high_share=0.0)
    assert fill.kept_tokens(single, 0) == [2 * 400]


def test_requests_are_divided_into_rows():
    """As an engine divides prompts: closed rows have full high pages and windows of their own."""
    lengths, segment = [700, 90, 300], 256
    assert fill.row_bounds(700, segment) == [0, 256, 512, 688, 700]
    assert fill.row_bounds(700, 0) == [0, 700]
    bounds = [fill.row_bounds(n, segment) for n in lengths]
    state = fill.make_pool(
        "k8v4-k4v2",
        64,
        torch.bfloat16,
        (1, 2),
        sum(len(b) - 1 for b in bounds),
        700,
        segment=segment,
    )
    tokens = fill.random_tokens(lengths, 2, 64, torch.bfloat16, "cpu")
    fill.fill(state, ops.load("cpu"), tokens, high_share=0.1, segment=segment)
    kept = state.num_tokens[:, 0]
    slots = iter(range(len(lengths), len(kept)))
    for slot, each in enumerate(bounds):
        chain = [next(slots) for _ in each[2:]]
        assert state.chains[slot, : int(state.chain_lens[slot])].tolist() == chain
        in_rows = kept[[*chain, slot]].sum(-1).tolist()
        assert in_rows == [[end - start] * 2 for start, end in itertools.pairwise(each)]
        per_page = state.layout.high.tokens_per_page
        assert all(
            high % per_page == 0 or low == 0 for high, low in kept[chain].view(-1, 2).tolist()
        )


def test_parts_of_the_overhead():
    """Of one request of one token: a page that holds one, its ring entry, and all tables."""
    state = fill.make_pool("k8v4", 64, torch.bfloat16, (1, 1), 1, 64)
    fill.fill(state, ops.load("cpu"), fill.random_tokens([1], 1, 64, torch.bfloat16, "cpu"), 1.0)
    parts = pool._overhead(state, 1, 64, 0)
    page, token = state.layout.page_bytes, state.layout.high.token_bytes
    budget = (page - token) / parts["half_empty_pages"]
    assert parts["ring"] * budget == pytest.approx(4)
    assert sum(parts.values()) == pytest.approx(1 - token / budget)


def run_of_a_grid(capsys, monkeypatch, grid, **faults):
    """Rows of a small grid, on a machine with small caches and without vLLM."""
    writer = Writer(HERE)
    monkeypatch.setattr(timing, "_cache_bytes", lambda _: 1 << 10)
    monkeypatch.setitem(timing.MIN_FLUSH_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(attention, "stock_cases", faults.get("stock", lambda *_: ([], ["no vLLM"])))
    attention.run(grid, "cpu", writer)
    return writer.rows, capsys.readouterr().out


def test_attention_rows(capsys, monkeypatch):
    grid = Grid(["k8v4-k4v2", "k16v16"], ["high", "low"], [100], [2], [2], [True], 2, 64, repeats=2)
    rows, printed = run_of_a_grid(capsys, monkeypatch, grid)
    assert [(row["quant"], row["tiers"]) for row in rows] == [
        ("k8v4-k4v2", "high"),
        ("k8v4-k4v2", "low"),
        ("k16v16", "high"),
    ]
    assert "no vLLM" in printed and printed.count("of read") == len(rows)
    high, low, exact = rows
    assert exact["bytes"] == 2 * (25 + 175) * 2 * 64 * 2
    assert exact["relative_error"] < 0.01 < high["relative_error"] < low["relative_error"]
    for row in rows:
        assert row["gb_per_s"] * row["ms"] * 1e6 == pytest.approx(row["bytes"])
        assert {"vs_stock_bf16", "peak_share"}.isdisjoint(row.measured)


def test_ratios_are_to_the_stock_kernels_that_ran(capsys, monkeypatch):
    def stock(query, tokens, scale, device):
        output = torch.empty_like(query)
        exact = dense_attention(query, tokens, scale)
        case = Case("stock bf16", lambda: output.copy_(exact), 1, {"engine": "stock bf16"})
        return [Checked(case, output, 0.01)], []

    grid = Grid(["k8v4"], ["high"], [100], [1], [2], [False], 2, 64, repeats=2)
    (theirs, ours), _ = run_of_a_grid(capsys, monkeypatch, grid, stock=stock)
    assert theirs["vs_stock_bf16"] == 1
    assert ours["vs_stock_bf16"] == pytest.approx(theirs["ms"] / ours["ms"])
    assert ours.get("vs_stock_fp8") is None


def test_a_wrong_output_is_never_timed(capsys, monkeypatch):
    """Whatever the format: its output is compared with attention over what its own pages hold."""
    kernels = ops.load("cpu")
    grid = Grid(["k8v4-k4v2"], ["low"], [100], [1], [2], [False], 2, 64, repeats=2)

    class Broken:
        def __getattr__(self, name):
            return getattr(kernels, name)

        def attend(self, state, layer, slots, query, scale, output, signs):
            kernels.attend(state, layer, slots, query, scale * 1.1, output, signs)

    monkeypatch.setattr(attention.ops, "load", lambda _: Broken())
    with pytest.raises(RuntimeError, match="k8v4-k4v2 low: wrong output, relative error"):
        run_of_a_grid(capsys, monkeypatch, grid)


def test_an_output_that_is_not_written_is_wrong():
    output = torch.zeros(1, 2, 4)
    with pytest.raises(RuntimeError, match="idle: wrong output, relative error nan"):
        attention._check(Checked(Case("idle", lambda: None, 1), output, 1.0), torch.ones(1, 2, 4))


def forbid_vllm(monkeypatch):
    for name in ["vllm", *(name for name in sys.modules if name.startswith("vllm."))]:
        monkeypatch.setitem(sys.modules, name, None)


def some_tokens(*lengths):
    tokens = fill.random_tokens(lengths, 2, 64, torch.bfloat16, "cpu")
    return tokens, torch.randn(len(lengths), 4, 64).bfloat16()


def test_kernels_of_a_gpu_are_named_where_they_are_missing(monkeypatch):
    forbid_vllm(monkeypatch)
    tokens, query = some_tokens(40, 20)
    found, missing = stock_cases(query, tokens, 0.125, "cuda")
    assert found == []
    assert [line.split(":")[0] for line in missing] == [
        "stock bf16",
        "stock fp8",
        "stock turboquant_k8v4",
        "stock turboquant_4bit_nc",
    ]
    assert missing[0].endswith("not here (torch's dense attention needs requests of one length)")
    assert all("vllm" in line for line in missing[1:])


def test_torch_is_the_baseline_without_vllm(monkeypatch):
    forbid_vllm(monkeypatch)
    tokens, query = some_tokens(40, 40, 40)
    (checked,), _ = stock_cases(query, tokens, 0.125, "cuda")
    assert (checked.case.name, checked.case.facts["kernel"]) == (
        "stock bf16",
        "torch flash-attention",
    )
    assert checked.case.num_bytes == 2 * 3 * 40 * 2 * 64 * 2
    assert attention._check(checked, dense_attention(query, tokens, 0.125)) < checked.limit


class FakeVllm:
    """vLLM's kernels for GPUs as its backends call them, in plain torch."""

    def __init__(self, version):
        self.version = version
        self.stored = {}

    def modules(self):
        base = "vllm.model_executor.layers.quantization.turboquant"
        config = SimpleNamespace(
            slot_size_aligned=208,
            slot_size=196,
            centroid_bits=1,
            key_packed_size=128,
            effective_value_quant_bits=4,
            key_mse_bits=0,
            key_fp8=True,
            norm_correction=False,
        )
        return {
            "vllm.v1.attention.backends.fa_utils": {
                "flash_attn_varlen_func": self.flash,
                "get_flash_attn_version": lambda head_size: self.version,
                "get_scheduler_metadata": lambda *_, **options: options["page_size"],
            },
            f"{base}.centroids": {"get_centroids": lambda *_: torch.tensor([1.0, -1.0])},
            f"{base}.config": {
                "TurboQuantConfig": SimpleNamespace(from_cache_dtype=lambda name, dim: config)
            },
            "vllm.v1.attention.backends.turboquant_attn": {
                "_build_hadamard": lambda dim, device: torch.eye(dim)
            },
            "vllm.v1.attention.ops.triton_turboquant_store": {
                "triton_turboquant_store": self.store
            },
            "vllm.v1.attention.ops.triton_turboquant_decode": {
                "triton_turboquant_decode_attention": self.decode
            },
        }

    def attend(self, query, key, value, table, lengths, scale, output):
        """Over key and value [slots, heads, head_dim], which a table of blocks of 16 names."""
        for row, length in enumerate(lengths.tolist()):
            at = torch.arange(length)
            slots = table[row, at // 16].long() * 16 + at % 16
            tokens = fill.Tokens(key[slots], value[slots], [length])
            output[row] = dense_attention(query[row : row + 1], tokens, scale)[0].to(output.dtype)

    def flash(self, query, key, value, longest_q, starts, longest, **options):
        assert (longest_q, longest) == (1, int(options["seqused_k"].max()))
        assert options["fa_version"] == self.version and options["causal"]
        assert options.get("scheduler_metadata") == (16 if self.version == 3 else None)
        assert ("k_descale" in options) == (key.element_size() == 1)
        flat = (x.reshape(-1, *x.shape[2:]) for x in (key, value))
        self.attend(
            query,
            *flat,
            options["block_table"],
            options["seqused_k"],
            options["softmax_scale"],
            options["out"],
        )

    def store(self, key, value, cache, slots, *_, **options):
        assert cache.shape[-1] == 208 and options == {"key_fp8": True}
        for name, x in (("key", key), ("value", value)):
            empty = torch.zeros(cache.shape[0] * 16, *x.shape[1:])
            mine = self.stored.setdefault((id(cache), name), empty)
            mine[slots.long()] = x.float()

    def decode(self, query, cache, table, lengths, rotation, centroids, scale, *_, **options):
        key, value = (self.stored[id(cache), name] for name in ("key", "value"))
        self.attend(query, key, value, table, lengths, scale, options["output_buf"])


@pytest.mark.parametrize("version", [2, 3])
def test_vllms_kernels_for_gpus_get_every_token_of_every_request(monkeypatch, version):
    """Blocks in random order, requests of several lengths, and both kinds of flash-attention."""
    for name, attributes in FakeVllm(version).modules().items():
        for part in itertools.accumulate(name.split("."), "{}.{}".format):
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
        vars(sys.modules[name]).update(attributes)
    tokens, query = some_tokens(40, 7, 64)
    found, missing = stock_cases(query, tokens, 0.125, "cuda")
    names = ["bf16", *(["fp8"] if version == 3 else []), "turboquant_k8v4", "turboquant_4bit_nc"]
    assert [checked.case.facts["quant"] for checked in found] == names
    assert missing == (
        [] if version == 3 else ["stock fp8: not here (flash-attention 2 has no fp8)"]
    )
    for checked in found:
        assert attention._check(checked, dense_attention(query, tokens, 0.125)) < checked.limit
    assert found[0].case.num_bytes == 2 * (40 + 7 + 64) * 2 * 64 * 2
    assert found[-1].case.num_bytes == 196 * (40 + 7 + 64) * 2


def test_random_workload_is_the_same_again_and_keeps_its_spread():
    workload = throughput.random_workload(50, 100, 20, 0.5, vocabulary=512)
    assert workload == throughput.random_workload(50, 100, 20, 0.5, vocabulary=512)
    lengths = [len(prompt) for prompt in workload.prompts]
    assert 50 <= min(lengths) < 70 < 130 < max(lengths) <= 150
    assert {*itertools.chain(*workload.prompts)} <= set(range(3, 512))


def figures(tokens, decode, prefill):
    return dict(zip(throughput.COMPARED, (tokens, decode, prefill), strict=True))


def test_rows_of_settings_and_their_ratios():
    compared = throughput.settings([{"quant": "k8v4", "alpha_high": 3.0}])
    writer = Writer(HERE)
    results = [
        [figures(2.0, 4.0, 8.0)],
        [{"error": "not here"}],
        [figures(3.0, 10.0, 6.0), figures(5.0, 12.0, 10.0), figures(4.0, 12.0, 8.0)],
    ]
    throughput.add_rows(writer, "throughput", {"model": "m"}, compared, results, throughput.label)
    stock, failed, ours = writer.rows
    assert stock.case == {"model": "m", "engine": "stock bf16", "quant": "bf16"}
    assert (failed["engine"], failed.error, failed.measured) == ("stock fp8", "not here", {})
    assert ours.case == {"model": "m", "engine": "diffkv", "quant": "k8v4", "alpha_high": 3.0}
    assert (ours["tokens_per_s"], ours["tokens_per_s_min"], ours["tokens_per_s_max"]) == (4, 3, 5)
    assert ours["vs_stock_bf16"] == 2.0
    assert ours["decode_vs_stock_bf16"] == 3.0
    assert ours["prefill_vs_stock_bf16"] == 1.0
    assert "vs_stock_fp8" not in ours.measured
    assert [throughput.label(row) for row in writer.rows] == [
        "stock bf16",
        "stock fp8",
        "diffkv k8v4",
    ]


def map_row(requests, ratio, ctx=1024, engine="diffkv", **more):
    case = {"engine": engine, "quant": "k8v4", "kv_bytes": 10**7, "ctx": ctx, "requests": requests}
    return Row("map", case, {"decode_vs_stock_bf16": ratio, **more}, HERE)


FAILED = replace(map_row(1, 1.0, engine="stock fp8"), measured={}, error="not here")


@pytest.mark.parametrize(
    ("ratios", "where"),
    [
        ((0.9, 1.2, 2.0), "from 4 requests on (0.90, 1.20, 2.00)"),
        ((1.2, 0.9, 2.0), "from 16 requests on (1.20, 0.90, 2.00)"),
        ((1.2, 2.0, 1.04), "nowhere (1.20, 2.00, 1.04)"),
        ((1.05, 2.0, 3.0), "from 1 requests on (1.05, 2.00, 3.00)"),
    ],
)
def test_where_a_gain_begins(ratios, where):
    rows = [map_row(num, ratio) for num, ratio in zip((1, 4, 16), ratios, strict=True)]
    (line,) = sweep.begins([*rows, FAILED])
    assert line == f"k8v4, decoding, of bf16, 10 MB: 1024 tokens {where}"


def test_a_map_leaves_out_what_does_not_fit():
    config = models.find("bench-small")
    wanted = sweep.Sweep([256, 4096], [1, 8], [], 64)
    room = 16384 * (256 + 64 + throughput.BLOCK_TOKENS) / sweep.SPARE
    assert wanted.cells(int(room) - 16384, config) == []
    small = [sweep.Cell(256, 1), sweep.Cell(256, 8)]
    assert wanted.cells(int(room) + 16384, config) == small
    assert wanted.cells(10**9, config) == [*small, sweep.Cell(4096, 1), sweep.Cell(4096, 8)]
    prompts = [cell.workload(64, 512).prompts for cell in small]
    assert [len(each) for each in prompts] == [1, 8]
    assert prompts[0][0] not in prompts[1]


MEASURED = {
    **figures(10.0, 20.0, 30.0),
    **dict.fromkeys(("seconds", "max_running", "preemptions", "bytes_per_token"), 1.0),
    "peak_memory_bytes": 10**9,
}


class FakeChild:
    """An engine whose DiffKV is twice as fast, and whose fp8 does not start."""

    def __init__(self, job):
        self.job = job

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self):
        pass

    def dismiss(self):
        pass

    def run(self, cell):
        if self.job.engine.get("kv_cache_dtype") == "fp8":
            return {"error": "no fp8 here"}
        factor = 1.0 if self.job.options is None else 2.0
        return {name: value * factor for name, value in MEASURED.items()}


def test_throughput_from_engines_to_rows(monkeypatch, capsys):
    monkeypatch.setattr(throughput, "Child", FakeChild)
    writer = Writer(HERE)
    workload = throughput.random_workload(3, 10, 4, 0.0, vocabulary=512)
    compared = throughput.settings([{"quant": "k8v4"}])
    throughput.run({"model": "m"}, [workload], 1 << 20, compared, 2, writer, {"model": "m"})
    stock, fp8, ours = writer.rows
    assert stock.case == {
        "model": "m",
        "engine": "stock bf16",
        "quant": "bf16",
        "kv_bytes": 1 << 20,
        "workload": "random 10 in, 4 out",
        "requests": 3,
        "repeats": 2,
    }
    assert (fp8.error, fp8.measured) == ("no fp8 here", {})
    assert (ours["vs_stock_bf16"], ours["tokens_per_s_max"]) == (2.0, 20.0)
    printed = capsys.readouterr().out
    assert "1 of 2, diffkv k8v4:     20.0 tokens/s, decoding 40.0, prefill 60" in printed
    assert "stock fp8              did not run: no fp8 here" in printed
    assert "2.00x of bf16, decoding 2.00x, prefill 2.00x" in printed
    with pytest.raises(ConfigError, match="no engine could run: no fp8 here"):
        throughput.run({}, [workload], 1 << 20, compared[1:2], 1, Writer(HERE), {})


@pytest.mark.parametrize(("together", "engines"), [(False, 12), (True, 3)])
def test_runs_start_their_own_engines_unless_all_are_there(monkeypatch, together, engines):
    entered = []
    monkeypatch.setattr(FakeChild, "__enter__", lambda self: entered.append(self.job) or self)
    monkeypatch.setattr(throughput, "Child", FakeChild)
    monkeypatch.setattr(child, "Child", FakeChild)
    loads = [throughput.random_workload(num, 10 * num, 4, 0.0, vocabulary=512) for num in (3, 2)]
    compared = throughput.settings([{"quant": "k8v4"}], ["bf16", "int4_per_token_head"])
    writer = Writer(HERE)
    throughput.run({}, loads, 1 << 20, compared, 2, writer, {}, together=together)
    assert len(entered) == engines
    assert [(row["engine"], row["requests"]) for row in writer.rows] == [
        (engine, requests)
        for requests in (3, 2)
        for engine in ("stock bf16", "stock int4_per_token_head", "diffkv")
    ]
    assert all(job.engine["max_num_seqs"] == 3 for job in entered)
    assert all(job.engine["max_model_len"] == 35 for job in entered)
    assert entered[1].engine["kv_cache_dtype"] == "int4_per_token_head"
    assert "kv_cache_dtype" not in entered[0].engine


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ("", (16, 1024, 128)),
        ("--load reasoning", (192, 1024, 2048)),
        ("--load long-context --num-prompts 8", (8, 16384, 512)),
        ("--output-len 7 --load chat", (256, 2048, 7)),
        ("--load chat reasoning", (256, 2048, 300)),
    ],
)
def test_a_load_sets_sizes_that_are_not_given(monkeypatch, options, sizes):
    def random_workload(num, input_len, output_len, range_ratio, vocabulary):
        raise ConfigError(f"asked for {(num, input_len, output_len)}")

    monkeypatch.setattr(throughput, "random_workload", random_workload)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["throughput", "--random-weights", "llama-3-8b", *options.split()])
    args.flags = []
    with pytest.raises(ConfigError, match=re.escape(f"asked for {sizes}")):
        run(args)


def test_a_map_from_engines_to_rows(monkeypatch, capsys):
    def in_turn(jobs, say):
        return [[FakeChild(job).run(cell) for cell in range(len(job.cells))] for job in jobs]

    monkeypatch.setattr(child, "in_turn", in_turn)
    config = models.find("bench-tiny")
    wanted = sweep.Sweep([64, 256], [1, 4], [4, 10**7], 8)
    compared = throughput.settings([{"quant": "k8v4"}])
    rows = sweep.run({}, config, wanted, compared, Writer(HERE), {"model": "m"})
    assert len(rows) == 2 * 2 * len(compared)
    assert [(row["ctx"], row["requests"]) for row in rows[::3]] == [
        (64, 1),
        (64, 4),
        (256, 1),
        (256, 4),
    ]
    assert {row.error for row in rows if row["engine"] == "stock fp8"} == {"no fp8 here"}
    assert all(row["decode_vs_stock_bf16"] == 2.0 for row in rows if row["engine"] == "diffkv")
    printed = capsys.readouterr().out
    assert "4 bytes of KV hold no request of the shortest context" in printed
    assert "k8v4, decoding, of bf16, 10 MB: 64 tokens from 1 requests on (2.00, 2.00)" in printed
    with pytest.raises(ConfigError, match="nothing was measured: no fp8 here"):
        sweep.run({}, config, wanted, compared[1:2], Writer(HERE), {})


def test_serving_from_servers_to_rows(monkeypatch, capsys):
    @contextlib.contextmanager
    def server(setting, *_):
        if setting.name == "stock fp8":
            raise ConfigError("the server ended with status 1: no fp8 here")
        yield setting.name

    def client(url, model, traffic, rate, is_ours, folder):
        assert is_ours == (url in ("diffkv", "http://there"))
        latencies = {f"p{p}_ttft_ms": p * rate for p in serving.PERCENTILES}
        counts = {"completed": 4, "failed": 0, "request_goodput": rate}
        return {"output_throughput": 7.0, "request_throughput": 1.0, **counts, **latencies}

    monkeypatch.setattr(serving, "_server", server)
    monkeypatch.setattr(serving, "_client", client)
    traffic = serving.Traffic([0.5, 2.0], 4, 64, 8, ["ttft:1000"], {"vllm_xargs": {"a": 1}})
    compared = throughput.settings([{"quant": "k8v4"}])
    writer = Writer(HERE)
    serving.run("m", traffic, compared, [], writer, {"model": "m"})
    assert [(row["engine"], row.get("rate")) for row in writer.rows] == [
        ("stock bf16", 0.5),
        ("stock bf16", 2.0),
        ("stock fp8", None),
        ("diffkv", 0.5),
        ("diffkv", 2.0),
    ]
    assert writer.rows[2].error.endswith("no fp8 here")
    assert writer.rows[0]["extra_body"] is None
    assert writer.rows[-1]["extra_body"] == traffic.extra_body
    assert (writer.rows[-1]["p95_ttft_ms"], writer.rows[-1].get("p95_tpot_ms")) == (190.0, None)
    assert "ttft 100/190/198, tpot -/-/-" in capsys.readouterr().out
    url = throughput.Setting("url", None, None, {})
    serving.run("m", traffic, [url], [], writer, {}, url="http://there")
    assert writer.rows[-1]["engine"] == "url" and "quant" not in writer.rows[-1].case
    with pytest.raises(ConfigError, match="no server could be measured: the server ended"):
        serving.run("m", traffic, compared[1:2], [], writer, {})


def test_share_of_a_prompt():
    mapped = [
        map_row(requests, 1.0, ctx=64, engine="stock bf16", prefill_tokens_per_s=speed)
        for requests, speed in ((4, 500.0), (1, 1000.0))
    ]
    writer = Writer(HERE)
    prompt.add_shares(writer, mapped, models.find("bench-tiny"), ["k8v4-k4v2", "k8v4"])
    assert [row.case for row in writer.rows] == [
        {"quant": "k8v4-k4v2", "ctx": 64},
        {"quant": "k8v4", "ctx": 64},
    ]
    for row in writer.rows:
        assert row["stock_prefill_ms"] == pytest.approx(64.0)
        assert row["share"] == pytest.approx((row["significance_ms"] + row["store_prompt_ms"]) / 64)


def test_plot_of_a_map_with_holes(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    path = tmp_path / "map.png"
    pages.draw_map([map_row(1, 0.9), map_row(4, 1.5, ctx=256), FAILED], path)
    assert path.stat().st_size > 2000
    with pytest.raises(ConfigError, match="nothing to plot"):
        pages.draw_map([FAILED], path)


def rows_of_all_kinds():
    """A row for each kind, some that did not run."""
    figures = {"tokens_per_s": 2.0, "decode_tokens_per_s": 3.0, "prefill_tokens_per_s": 4.0}
    spans = {f"{name}_{end}": 1.0 for name in figures for end in ("min", "max")}
    shape = {"ctx": 1024, "batch": 8, "group": 4, "ragged": False}
    ours = {"engine": "diffkv", "quant": "k8v4-k4v2"}
    times = {"ms": 0.5, "ms_p20": 0.4, "ms_p80": 0.6}
    work = {"model": "m", "workload": "w", "requests": 4, "kv_bytes": 10**9}
    pools = {"op": "append", "num_requests": 1, "ctx": 1, "num_layers": 2, "num_kv_heads": 3}
    parts = {"tables": 0.01, "ring": 0.02, "half_empty_pages": 0.03, "overhead": 0.06}
    prompts = {"significance_ms": 1, "store_prompt_ms": 2, "stock_prefill_ms": 30, "share": 0.1}
    chats = {"model": "m", "conversations": 2, "turns": 2, "system_len": 5, "answer_len": 3}
    chats["kv_bytes"] = 10**9
    first = {f"{name}_ttft_ms": 4.0 for name in ("mean", "p50", "p95")}
    first |= {f"mean_ttft_ms_{end}": 4.0 for end in ("min", "max")}
    turns = {"p50_ttft_ms_by_turn": [4.0, 2.0], "prompt_tokens_by_turn": [7.0, 9.0]}
    made = [
        ("attention", {**ours, "tiers": "mix", **shape}, {**times, "vs_stock_bf16": 2.5}),
        ("pool", pools, {**times, "share": 0.2}),
        ("growth", {"op": "append", "sweep": "ctx", "sizes": [1, 4]}, {"exponent": 0.5}),
        ("overhead", {"ctx": 1024, "max_model_len": 2048}, parts),
        ("throughput", {**ours, **work}, {**figures, **spans}),
        ("prompt", {"quant": "k8v4", "ctx": 64}, prompts),
        ("agent", {**ours, **chats}, {**figures, **spans, **first, **turns}),
        ("agent_check", {"quant": "k16v16"}, {"tokens": 9, "equal": True}),
        ("serving", {**ours, "rate": 0.5}, {"p95_ttft_ms": 7.0, "p95_tpot_ms": 8.0}),
    ]
    rows = [Row(kind, case, measured, HERE) for kind, case, measured in made]
    return [*rows, map_row(4, 1.5), replace(FAILED, kind="throughput")]


def test_sections_of_all_kinds(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    page = Page("On a CPU")
    assert {row.kind for row in rows_of_all_kinds()} == set(pages.KINDS)
    drawn = pages.add_sections(page, [*rows_of_all_kinds(), Row("other", {}, {}, HERE)], tmp_path)
    page.write(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert "| diffkv k8v4-k4v2, mix | 1,024 | 8 | 4 | 0.500 (0.400 to 0.600) |" in text
    assert "| 2,048 | 1.00% | 2.00% | 3.00% | 6.00% |" in text
    assert "* k8v4, decoding, of bf16, 10 MB: 1024 tokens from 4 requests on (1.50)" in text
    assert "Did not run:\n\n* stock fp8: not here" in text
    assert drawn == ["attention.png", "map.png", "agent.png", "serving.png"]
    assert all(f"]({name})" in text and (tmp_path / name).exists() for name in drawn)


def test_loads_have_tables_of_their_own(tmp_path):
    page = Page("On a CPU")
    (row,) = [each for each in rows_of_all_kinds() if each.kind == "throughput" and not each.error]
    other = replace(row, case={**row.case, "requests": 9})
    pages.add_sections(page, [row, other, row], tmp_path, with_plots=False)
    page.write(tmp_path / "README.md")
    _, few, many = (tmp_path / "README.md").read_text().split("m, w, ")
    assert few.startswith("4 requests, 1,000 MB of KV for each engine:")
    assert many.startswith("9 requests, ")
    assert [part.count("| diffkv k8v4-k4v2 |") for part in (few, many)] == [2, 1]


def test_sections_of_two_machines_without_plots(tmp_path):
    page = Page("On CPUs")
    other = replace(HERE, device="Other CPU (AMX)")
    both = [row for row in rows_of_all_kinds() if row.kind == "attention"]
    both += [replace(row, provenance=other) for row in both]
    assert pages.add_sections(page, both, tmp_path, with_plots=False) == []
    page.write(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert text.count("## Decode attention") == 1
    assert text.index("Some CPU;") < text.index("Other CPU (AMX);")
    assert text.count("| diffkv k8v4-k4v2, mix |") == 2


def test_sizes_of_known_models():
    per_token = {name: throughput.bf16_bytes(config) for name, config in models.MODELS.items()}
    assert per_token["llama-3-8b"] == 131072
    assert per_token["qwen2.5-7b"] == 57344
    assert per_token["bench-small"] == 16384


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("attention --quant k3v3", "k_bits must be one of"),
        ("attention --no-such-option", "has no option --no-such-option"),
        ("manager --quant k8v4-k8v8", "diffkv: "),
        ("throughput --random-weights gpt-9", "--random-weights must be one of bench-tiny"),
        ("map --random-weights bench-tiny --kv-bytes 1K", "no budget holds a request"),
        ("throughput --paper", "--paper needs --kv-bytes"),
        ("throughput --profile --together", "leave out --together"),
        ("throughput --alpha-high -1", "alpha_high"),
        ("throughput --workload /no/such/file", "is no file of JSON lines"),
        ("attention --ctx 0", "diffkv: --ctx must be a whole number of at least 1, got '0'"),
        ("attention --ctx 1GB", "diffkv: --ctx must be a number of tokens, as 32768 or 32K, got"),
        ("map --kv-bytes 0K", "diffkv: --kv-bytes must be bytes or a number with a unit, as in"),
        ("serving --rates 0", "diffkv: --rates must be above 0, got 0"),
        ("serving --rates fast", "diffkv: --rates must be a number, got fast"),
    ],
)
def test_refuses_in_one_line(capsys, command, message):
    assert main(["bench", *command.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_diffkv_report_has_the_rows_of_diffkv_bench(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{row.to_json()}\n" for row in rows_of_all_kinds()))
    assert main(["report", str(file), "--out", str(tmp_path), "--no-plots"]) == 0
    assert capsys.readouterr().out.endswith("report.md\n")
    assert "## Where the gain is" in (tmp_path / "report.md").read_text()
