"""Calibration by texts: the search against known distances, and the command on a small model."""

import json
from dataclasses import replace

import pytest

from diffkv.cli import main
from diffkv.lab.calibrate import distance, file
from diffkv.lab.calibrate import search as climbing
from diffkv.lab.calibrate.distance import Limits, choose, nearest, search
from diffkv.lab.calibrate.journal import Journal
from diffkv.lab.calibrate.search import HIGH_GRID, LOW_GRID, Setting
from diffkv.lab.evaluation import kld
from diffkv.lab.evaluation.results import DistanceScore
from diffkv.policy import Thresholds
from diffkv.quant import QuantConfig
from diffkv.vllm_plugin.options import Options

DEFAULT, BETTER = QuantConfig.parse("k8v4-k4v2"), QuantConfig.parse("k8v8-k4v4")
SINGLE = QuantConfig.parse("k8v4")
ALPHA_HIGH = ("alpha_high",)
SCORE = DistanceScore("all", 2, 16, *[0.0] * 3, 1.0, 0.0, 0.0, *[0.0] * 9)


def score(mean, num_bytes, p99=0.0):
    return replace(SCORE, kld_mean=mean, kld_p99=p99, bytes_per_token=num_bytes)


def fake(quant, setting):
    """Distances grow with thresholds, and bytes fall; better formats cost a third more."""
    alphas = setting.thresholds
    factor, more = (0.1, 400) if quant == BETTER else (1.0, 0)
    mean = factor * (0.004 + 0.0002 * alphas.alpha_high + 0.1 * alphas.alpha_low)
    return score(mean, 1200 + more - alphas.alpha_high - 100 * alphas.alpha_low, 10 * mean)


@pytest.mark.parametrize("limit", [0.0039, 0.004, 0.00461, 0.0061, 1.0])
@pytest.mark.parametrize("p99", [0.045, 10.0])
def test_the_choice_is_the_cheapest_of_a_full_sweep(limit, p99):
    tried = search(fake, [DEFAULT], Limits(limit, p99), ALPHA_HIGH)
    fitting = [
        alpha
        for alpha in HIGH_GRID
        if 0.004 + 0.0002 * alpha <= limit and 10 * (0.004 + 0.0002 * alpha) <= p99
    ]
    chosen = choose(tried)
    if not fitting:
        assert chosen is None
        assert [each.setting for each in tried] == [Setting(Thresholds())]
        return
    assert chosen.setting == Setting(Thresholds(max(fitting), 0.0))
    assert len(tried) == len({each.setting for each in tried}) <= 5
    accepted = [each for each in tried if each.accepted]
    assert chosen.score.bytes_per_token == min(e.score.bytes_per_token for e in accepted)


def test_the_cheapest_of_all_formats_is_chosen():
    quants = [DEFAULT, BETTER, SINGLE]
    tried = search(fake, quants, Limits(0.005), ALPHA_HIGH)
    assert choose(tried).quant == DEFAULT
    assert [each.quant for each in tried] == sorted((e.quant for e in tried), key=quants.index)
    assert sum(each.quant == SINGLE for each in tried) == 1  # there is no low tier to search
    tried = search(fake, quants, Limits(0.00095), ALPHA_HIGH)
    assert choose(tried).quant == BETTER
    assert choose(tried).setting == Setting(Thresholds(20.0, 0.0))


def test_of_equal_bytes_the_nearest_to_full_precision_is_chosen():
    means = {0.0: 0.001, 7.0: 0.003, 30.0: 0.002, 50.0: 0.0025, 100.0: 0.004}
    tried = search(
        lambda _, setting: score(means.get(setting.thresholds.alpha_high, 1.0), 100),
        [DEFAULT],
        Limits(0.005),
        ALPHA_HIGH,
    )
    assert choose(tried).setting == Setting(Thresholds())


def test_drops_are_searched_when_asked_for():
    tried = search(fake, [DEFAULT], Limits(0.0101), ("alpha_high", "alpha_low"))
    assert choose(tried).setting == Setting(Thresholds(30.0, 0.0))
    tried = search(fake, [DEFAULT], Limits(0.1), ("alpha_high", "alpha_low"))
    assert choose(tried).setting == Setting(Thresholds(100.0, LOW_GRID[-1]))


def test_the_nearest_is_the_one_that_exceeds_its_limits_least():
    found = {DEFAULT: score(0.02, 100, 0.1), BETTER: score(0.01, 200, 0.9)}
    tried = search(lambda quant, _: found[quant], list(found), Limits(0.001, 0.05), ALPHA_HIGH)
    assert [each.used for each in tried] == pytest.approx([20, 18])
    assert nearest(tried).quant == BETTER
    tried = search(lambda quant, _: found[quant], list(found), Limits(0.001, 0.01), ALPHA_HIGH)
    assert nearest(tried).quant == DEFAULT


def test_engines_run_what_was_measured(tmp_path):
    read = []

    def compare(cache):
        read.append(cache)
        return [SCORE, replace(SCORE, context=128)]

    measure = distance.reader(compare, 32, Journal(tmp_path / "j", {}))
    setting = Setting(Thresholds(2.0, 0.1), 0.75)
    assert measure(DEFAULT, setting) == measure(DEFAULT, setting) == SCORE
    (cache,) = read
    assert cache.name == "k8v4-k4v2, alpha_high 2, alpha_low 0.1, distinct 0.75"
    spec = cache.kind
    options = Options.parse({**setting.values(DEFAULT), "window": 32})
    assert (spec.thresholds, spec.window) == (options.thresholds(), 32) == (setting.thresholds, 32)
    assert spec.policy.text == options.policy == "paper:distinct=0.75"
    assert (spec.rotate, spec.segment) == (options.rotation(), options.segment)


COMMAND = (
    *("calibrate", "--quant", "k8v4-k4v2", "k8v8-k4v4", "--contexts", "128"),
    *("--num-texts", "2", "--steps", "8", "--threads", "1"),
)


@pytest.fixture(name="few")
def _few(monkeypatch):
    """A grid of few thresholds, and how often the texts were read."""
    monkeypatch.setattr(climbing, "HIGH_GRID", (0.0, 2.0, 50.0))
    reads = []
    read, read_full = kld._read, kld._read_full
    monkeypatch.setattr(kld, "_read", lambda *all: reads.append(all[1].name) or read(*all))
    monkeypatch.setattr(
        kld, "_read_full", lambda *all: reads.append("full precision") or read_full(*all)
    )
    return reads


def test_the_command_writes_what_others_take(tmp_path, capsys, few):
    out = tmp_path / "c.toml"
    assert main([*COMMAND, "--max-kl", "0.5", "--max-p99", "5", "--out", str(out)]) == 0
    found, printed = file.read(out), capsys.readouterr()
    assert few[0] == "full precision" and few.count("full precision") == 1
    assert len(few) == len(set(few)) == 1 + len(found.curve) == 7
    assert found.choice.quant == "k8v4-k4v2" and found.choice.alpha_high == 50
    assert found.choice.bytes_per_token == min(p.bytes_per_token for p in found.curve)
    assert (found.max_loss, found.max_p99, found.data.metric) == (0.5, 5, "kld")
    assert (found.data.samples, found.data.steps) == (2, 8)
    assert set(found.source.versions) == {"diffkv", "torch", "transformers"}
    for point in found.curve:
        assert point.accepted and 0 < point.loss < 0.5 and point.kld_p99 < 5
        assert 0 < point.same_top1 <= 1 and point.loss_ci95 is None
        assert point.ratio_bf16 == pytest.approx(1536 / point.bytes_per_token)
    better = [point.loss for point in found.curve if point.quant == "k8v8-k4v4"]
    assert max(better) < min(p.loss for p in found.curve if p.quant == "k8v4-k4v2")
    assert f"{found.choice.bytes_per_token:,.0f}" in printed.out and "chosen" in printed.out
    assert printed.err.count("within the limits") == 6

    options = Options.parse(found.values())
    assert options.thresholds() == Thresholds(50.0, 0.0)
    assert found.finding().startswith("mean KL 0.") and "2 texts of the shipped" in found.finding()


def test_out_of_reach_names_the_nearest_and_is_resumed(tmp_path, capsys, few):
    out = tmp_path / "c.toml"
    command = [*COMMAND, "--out", str(out)]
    assert main([*command, "--max-kl", "1e-9"]) == 2
    err = capsys.readouterr().err
    assert "within 1e-09; the nearest is k8v8-k4v4, alpha_high 0, alpha_low 0: mean KL" in err
    assert not out.exists()
    assert few == ["full precision", *(f"{q}, {Setting(Thresholds())}" for q in (DEFAULT, BETTER))]

    few.clear()
    assert main([*command, "--max-kl", "1e-9"]) == 2  # all of it was found
    assert few == []
    assert f"going on from {out}.partial" in capsys.readouterr().err
    assert main([*command, "--max-kl", "0.5"]) == 0
    assert len(few) == 1 + 4 and f"k8v4-k4v2, {Setting(Thresholds())}" not in few
    assert not out.with_name("c.toml.partial").exists()

    assert main([*command, "--max-kl", "1e-9"]) == 2
    assert main([*command, "--max-kl", "1e-9", "--dtype", "bfloat16"]) == 2
    assert "is of another run (other dtype)" in capsys.readouterr().err


def test_texts_of_files_and_folders(tmp_path, capsys, few):
    words = "k1 v1 ; " * 60
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(words + "\n" + words)
    (folder / "b.jsonl").write_text(json.dumps({"text": words}) + "\n")
    (tmp_path / "lines.txt").write_text(f"{words}\n{words}\n{words}\n")
    out = tmp_path / "c.toml"
    limits = ("--max-kl", "9", "--quant", "k8v4", "--steps", "4", "--out", str(out))
    paths = (str(folder), str(tmp_path / "lines.txt"))
    assert main(["calibrate", *limits, "--texts", *paths]) == 0
    assert file.read(out).data.samples == 5
    assert file.read(out).data.source == "texts, lines.txt"
    assert main(["calibrate", *limits, "--texts", *paths, "--contexts", "300"]) == 0
    assert file.read(out).data.samples == 1  # the lines are shorter
    assert main(["calibrate", *limits, "--texts", *paths, "--contexts", "600"]) == 2
    assert "no text has 600 tokens, the longest" in capsys.readouterr().err


KL = ("--max-kl", "0.01")
LOSS = ("--max-loss", "1%", "--data", "synth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of them (neither is given)"),
        ((*KL, *LOSS), "give one of them (both are given)"),
        (("--max-loss", "1%"), "--max-loss asks questions: give them as --data"),
        ((*KL, "--data", "synth"), "--data is for --max-loss, not for --max-kl"),
        ((*KL, "--seed", "0"), "--seed is for --max-loss"),
        ((*KL, "--kv-memory", "1GiB"), "--kv-memory is for --max-loss"),
        ((*LOSS, "--max-p99", "1"), "--max-p99 is for --max-kl, not for --max-loss"),
        ((*LOSS, "--steps", "8"), "--steps is for --max-kl"),
        ((*LOSS, "--quant", "k8v4", "k8v8"), "--max-loss takes one --quant, got k8v4 and k8v8"),
        ((*KL, "--max-model-len", "9"), "unknown option --max-model-len: only --max-loss"),
        (("--max-kl", "0"), "--max-kl must be above 0, got 0"),
        (("--max-kl", "nan"), "--max-kl must be above 0, got nan"),
        (("--max-kl", "inf"), "--max-kl must be a number, got inf"),
        (("--max-kl", "1%"), "--max-kl must be a number, got 1%"),
        ((*KL, "--max-p99", "-1"), "--max-p99 must be above 0, got -1"),
        ((*KL, "--quant", "k3v3"), "k_bits must be one of"),
        ((*KL, "--quant", "k8v4", "--search", "alpha_high,distinct"), "k8v4 has no low tier"),
        ((*KL, "--steps", "1"), "--steps must be at least 2, got 1"),
        ((*KL, "--contexts", "64"), "--contexts must be at least 130 for --steps 64, got 64"),
        ((*KL, "--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16, got int8"),
        ((*KL, "--window", "0"), "window must be at least 1 token, got 0"),
        ((*KL, "--texts", "/nowhere"), "cannot read --texts /nowhere"),
        ((*KL, "--texts", "."), "--texts . is a folder without files"),
        ((*KL, "--out", "/no/c.toml"), "/no is no folder"),
        ((*KL, "--model", "/nowhere"), "/nowhere"),
    ],
)
def test_options_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diffkv: ") and message in line
