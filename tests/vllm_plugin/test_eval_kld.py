"""`diffkv eval --suite kld --engine vllm`, and the answers that `diffkv demo` shows."""

import pytest
import torch

from diffkv.cli import demo, main
from diffkv.cli.engine_options import model_folder
from diffkv.lab import rows as lab_rows
from diffkv.lab.evaluation.results import scores
from diffkv.lab.evaluation.side_by_side import Answered, Question, Sides, answer
from diffkv.quant import ConfigError
from diffkv.segments import SEGMENT
from diffkv.use import CacheUse
from diffkv.vllm_plugin.options import Options

COMMAND = ["eval", "--suite", "kld", "--engine", "vllm", "--steps", "16", "--num-texts", "3"]
CACHES = ["--against", "bf16,fp8,k16v16,int8_per_token_head", "--batch-size", "4", "--json"]
HAS_FP8 = torch.cpu._is_avx512_supported()
"""vLLM has no fp8 cache on a CPU without AVX-512, and says so."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return tmp_path_factory.mktemp("results") / "kld.jsonl"


@pytest.fixture(scope="module")
def rows(results):
    """The first run, by the names of the caches."""
    assert main([*COMMAND, *CACHES, "--quant", "k4v2", "--out", str(results)]) == 0
    return {row["cache"]: row for row in lab_rows.read(results)}


def test_caches_are_compared_on_the_same_texts(rows):
    rows = dict(rows)
    assert rows.pop("int8_per_token_head").error.startswith("vLLM has no such cache on a CPU")
    assert list(rows) == ["bf16", "fp8", "k16v16", "k4v2"]
    assert (rows["k4v2"]["segment"], rows["k4v2"]["alpha_high"]) == (SEGMENT, 0), "defaults too"
    if not HAS_FP8:
        assert "requires x86 with AVX-512" in rows.pop("fp8").error
    found = {name: scores(row) for name, row in rows.items()}
    assert {len(cells) for cells in found.values()} == {4}  # all texts, and three lengths
    every = {name: cells[0] for name, cells in found.items()}
    assert {(cell.context, cell.n, cell.steps) for cell in every.values()} == {("all", 3, 48)}
    kld = {name: cell.kld_mean for name, cell in every.items()}
    assert kld["k16v16"] <= 1e-6 < kld["bf16"] < kld["k4v2"]
    assert (every["k16v16"].first_divergence, every["k16v16"].diverged) == (16, 0)
    ratio = {name: cell.ratio_bf16 for name, cell in every.items()}
    assert (
        0.4 < ratio["k16v16"] < 0.5 < ratio["bf16"] <= 1 < ratio.get("fp8", 2) <= 2 < ratio["k4v2"]
    )


def test_a_second_run_measures_nothing_twice(rows, results, capsys, monkeypatch):
    monkeypatch.setattr("diffkv.lab.evaluation.vllm_kld._read", None)
    monkeypatch.setattr("diffkv.lab.evaluation.vllm_kld._read_full", None)
    before = results.read_text()

    against = "bf16,fp8,k16v16" if HAS_FP8 else "bf16,k16v16"
    known = ["--against", against, "--batch-size", "4", "--json", "--quant", "k4v2"]
    assert main([*COMMAND, *known, "--out", str(results), "--resume"]) == 0

    printed = [lab_rows.Row.parse(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [row for row in rows.values() if row.error is None]
    assert results.read_text() == before


def test_a_cache_that_the_device_has_not_is_named(capsys, tmp_path):
    command = [*COMMAND, "--against", "int8_per_token_head", "--quant", "k8v8", "--json"]
    assert main(command) == 0

    out, err = capsys.readouterr()
    absent, ours = (lab_rows.Row.parse(line) for line in out.splitlines())
    assert (absent["cache"], absent.measured, ours["cache"]) == ("int8_per_token_head", {}, "k8v8")
    reason = "vLLM has no such cache on a CPU: there are fp8, fp8_e4m3, fp8_e5m2"
    assert absent.error == reason and ours.error is None
    assert f"diffkv: int8_per_token_head is not there: {reason}" in err


def test_other_results_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    assert main([*COMMAND, "--out", str(tmp_path / "other.jsonl"), "--resume"]) == 2
    assert "other.jsonl, line 1: a row has no field a" in capsys.readouterr().err


def test_an_answer_is_followed_and_given_by_each_cache(messages):
    arguments = demo.engine_arguments(model_folder("reference"))
    others = {
        "lossless": ({}, Options(quant="k16v16")),
        "lossy": ({}, Options(quant="k2v1")),
        "absent": ({"kv_cache_dtype": "int4_per_token_head"}, None),
    }
    asked = [Question(name, "In", 20, "What was it?") for name in ("spring", "autumn")]
    told = []

    sides = answer(arguments, others, asked, 12, lambda *report: told.append(report))

    lossless, lossy = sides.caches
    assert lossless.same_tokens == sides.num_tokens and lossless.same_top1 == 1
    assert lossless.texts == sides.texts and lossless.kld_mean < 1e-6
    assert lossy.kld_mean > 1e-4 and lossy.use.bytes_per_token < lossless.use.bytes_per_token / 4
    assert len(sides.missing) == 1 and sides.missing[0].startswith("absent: vLLM has no such cache")
    assert told[0] == ("full precision", 0, 2) and ("lossless", 4, 4) in told


def test_without_network_the_shipped_model_answers(monkeypatch, capsys):
    def unreachable(name):
        raise ConfigError("pip cannot get it (no network)")

    asked = []
    monkeypatch.setattr(demo, "model_folder", unreachable)
    monkeypatch.setattr(demo.generate, "run", lambda args: asked.append(args) or 0)

    assert main(["demo", "--quant", "k8v8"]) == 0

    assert asked[0].model == "reference" and asked[0].compare and asked[0].quant == "k8v8"
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "diffkv: pip cannot get it (no network)",
        "diffkv: the toy model that ships with the package answers instead",
    ]


def test_the_screen_says_what_was_measured(capsys):
    fp8 = CacheUse(tokens=10, high=10, num_bytes=120_000, bf16_bytes=240_000)
    ours = CacheUse(tokens=10, high=1, low=9, num_bytes=60_000, bf16_bytes=240_000)
    caches = [
        Answered("vLLM fp8", fp8, [3, 0], 0.02, 0.9, []),
        Answered("DiffKV", ours, [5, 9], 0.01, 0.95, ["one", "two"]),
    ]
    sides = Sides([900, 2_000], [5, 12], ["one", "three"], caches, ["absent: no such cache"])

    demo.print_sides("smollm2", sides, Options())

    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0][1:] == ["one", "3 of 5", "5 of 5"]
    assert ["bytes a token, all layers", "24,000", "12,000", "6,000"] in cells
    assert ["smaller than bf16", "1.00x", "2.00x", "4.00x"] in cells
    assert ["smaller than fp8", "0.50x", "1.00x", "2.00x"] in cells
    assert ["requests in 1 GiB", "22", "44", "87"] in cells
    assert ["mean KL from full precision", "", "0.0200", "0.0100"] in cells
    assert ["same first choice", "", "90.0%", "95.0%"] in cells
