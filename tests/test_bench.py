"""What `diffkv bench` computes from its timings, and that it refuses what makes no sense."""

import itertools

import numpy as np
import pytest
import torch

from diffkv import ops
from diffkv.cli import main
from diffkv.lab.bench import fill, gain_map, manager, models, plots, prompt, throughput
from diffkv.lab.bench.attention import Grid, Point
from diffkv.lab.bench.facts import Rows, percentile
from diffkv.lab.bench.host_table import HostTable
from diffkv.lab.bench.timing import Case, measure


def test_percentile_is_a_value_that_was_measured():
    values = [float(x) for x in range(10)]
    assert [percentile(values, share) for share in (0.0, 0.2, 0.8, 1.0)] == [0, 2, 8, 9]


def test_exponent_of_a_power_law():
    sizes = [1, 4, 16, 64]
    assert manager.exponent(sizes, [3 * size**0.5 for size in sizes]) == pytest.approx(0.5)


def test_cases_run_in_turn():
    order = []
    cases = [Case(name, lambda n=name: order.append(n), 1, {}) for name in "ab"]
    timings = measure(cases, repeats=3)
    assert "".join(order) == "ab" * (len(order) // 2)
    assert all(0 <= t.p20 <= t.ms <= t.p80 for t in timings)


def test_grid_has_no_ragged_batch_of_one():
    grid = Grid(["k8v4"], ["high"], [1024], [1, 8], [4, 8], [False, True])
    points = list(grid.points())
    assert len(points) == 2 * 2 + 2
    assert len(set(map(str, points))) == len(points)
    assert sum(Point(1024, 8, 4, True).lengths()) == pytest.approx(8 * 1024, abs=8)


def test_useful_bytes_are_those_of_the_kept_tokens():
    state = fill.make_pool("k8v4-k4v2", 64, torch.bfloat16, (1, 2), 2, 300)
    tokens = fill.random_tokens([300, 100], 2, 64, torch.bfloat16, "cpu")
    fill.fill(state, ops.load("cpu"), tokens, high_share=0.0)
    high, low = state.layout.tiers
    in_window = state.window
    assert fill.useful_bytes(state, 0) == 2 * (
        2 * in_window * high.token_bytes + (400 - 2 * in_window) * low.token_bytes
    )


def test_host_tables_do_the_same():
    shape = (2, 3, 2, 64)
    vectorised, by_hand = (HostTable(shape, (8, 12), 0.3, 3.0) for _ in range(2))
    for _ in range(20):
        vectorised.step_numpy()
        by_hand.step_python()
    for one, other in ((vectorised._counts, by_hand._counts), (vectorised._pages, by_hand._pages)):
        np.testing.assert_array_equal(one, other)


def test_random_workload_is_the_same_again_and_keeps_its_spread():
    workload = throughput.random_workload(50, 100, 20, 0.5, vocabulary=512)
    assert workload == throughput.random_workload(50, 100, 20, 0.5, vocabulary=512)
    lengths = [len(prompt) for prompt in workload.prompts]
    assert 50 <= min(lengths) < 70 < 130 < max(lengths) <= 150
    assert {*itertools.chain(*workload.prompts)} <= set(range(3, 512))


def test_ratios_do_not_depend_on_the_order_of_settings():
    names = throughput.COMPARED
    stock = {"engine": "stock bf16", **dict(zip(names, (2.0, 4.0, 8.0), strict=True))}
    ours = {"engine": "diffkv", **dict(zip(names, (3.0, 10.0, 6.0), strict=True))}
    failed = {"engine": "stock fp8", "error": "not here"}
    expected = {
        "vs_stock_bf16": 1.5, "decode_vs_stock_bf16": 2.5, "prefill_vs_stock_bf16": 0.75,
        "vs_stock_fp8": None, "decode_vs_stock_fp8": None, "prefill_vs_stock_fp8": None,
    }  # fmt: skip
    assert throughput.ratios(ours, [stock, ours]) == expected
    assert throughput.ratios(ours, [ours, stock]) == expected
    assert set(throughput.ratios(failed, [stock, ours]).values()) == {None}


def map_row(requests, ratio, ctx=1024, **more):
    row = {"engine": "diffkv", "quant": "k8v4", "kv_bytes": 10**7, "ctx": ctx, "requests": requests}
    return {**row, **dict.fromkeys(gain_map.RATIOS), "decode_vs_stock_bf16": ratio, **more}


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
    failed = {"engine": "stock fp8", "error": "not here"}
    (line,) = gain_map.begins([*rows, failed])
    assert line == f"k8v4, decoding, of bf16, 10 MB: 1024 tokens {where}"


def test_a_map_leaves_out_what_does_not_fit():
    config = models.find("bench-small")
    wanted = gain_map.Map([256, 4096], [1, 8], [], 64)
    room = 16384 * (256 + 64 + throughput.BLOCK_TOKENS) / gain_map.SPARE
    assert wanted.cells(int(room) - 16384, config) == []
    small = [gain_map.Cell(256, 1), gain_map.Cell(256, 8)]
    assert wanted.cells(int(room) + 16384, config) == small
    assert wanted.cells(10**9, config) == [*small, gain_map.Cell(4096, 1), gain_map.Cell(4096, 8)]
    prompts = [cell.workload(64, 512).prompts for cell in small]
    assert [len(each) for each in prompts] == [1, 8]
    assert prompts[0][0] not in prompts[1]


def test_share_of_a_prompt():
    rows = Rows(as_json=True)
    for requests, speed in ((4, 500.0), (1, 1000.0)):
        row = map_row(requests, None, ctx=64, engine="stock bf16", prefill_tokens_per_s=speed)
        rows.add(row, "")
    prompt.add_shares(rows, models.find("bench-tiny"), ["k8v4-k4v2", "k8v4"])
    shares = rows.rows[2:]
    assert [(row["op"], row["quant"]) for row in shares] == [
        ("prompt", "k8v4-k4v2"), ("prompt", "k8v4"),
    ]  # fmt: skip
    for row in shares:
        assert row["stock_prefill_ms"] == pytest.approx(64.0)
        assert row["share"] == pytest.approx((row["significance_ms"] + row["store_prompt_ms"]) / 64)


def test_plot_of_a_map_with_holes(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    rows = [map_row(1, 0.9), map_row(4, 1.5, ctx=256), {"engine": "diffkv", "error": "no"}]
    plots.plot_map(rows, gain_map.RATIOS, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000


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
        ("attention --ctx 0", "--ctx must be above 0, got 0"),
        ("manager --quant k8v4-k8v8", "diffkv: "),
        ("throughput --random-weights gpt-9", "--random-weights must be one of bench-tiny"),
        ("map --ctx 0", "--ctx must be above 0, got 0"),
        ("map --random-weights bench-tiny --kv-bytes 1K", "no budget holds a request"),
        ("throughput --paper", "--paper needs --kv-bytes"),
        ("throughput --alpha-high -1", "alpha_high"),
        ("throughput --workload /no/such/file", "is no file of JSON lines"),
    ],
)  # fmt: skip
def test_refuses_in_one_line(capsys, command, message):
    assert main(["bench", *command.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
