"""Calibration with an engine: one engine, many thresholds, and a file that the others take."""

import json
from pathlib import Path

import pytest

from diffkv.cli import main
from diffkv.lab.calibrate import file, search

DATA = Path(__file__).parents[2] / "examples" / "lm_eval" / "lists.jsonl"
NUM = 3


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Calibrated by three prompts, on a grid of few thresholds."""
    out = tmp_path_factory.mktemp("calibrate") / "calibration.toml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "HIGH_GRID", (0.0, 1.0, 5.0))
        patch.setattr(search, "LOW_GRID", (0.0, 0.2))
        patch.setattr(search, "DISTINCT_GRID", (1.0, 0.9))
        arguments = ["--data", str(DATA), "--samples", str(NUM), "--max-tokens", "8"]
        arguments += ["--search", ",".join(search.STEPS)]
        assert main(["calibrate", *arguments, "--max-loss", "1%", "--out", str(out)]) == 0
    assert not out.with_name("calibration.toml.partial").exists()
    return out


def test_curve(calibrated):
    found = file.read(calibrated)
    choice, curve = found.choice, found.curve
    assert found.data.samples == NUM and found.data.metric == "right_words"
    assert (curve[0].alpha_high, curve[0].alpha_low, curve[0].high) == (0, 0, 1)
    assert any(
        (point.alpha_high, point.alpha_low, point.distinct, point.bytes_per_token)
        == (choice.alpha_high, choice.alpha_low, choice.distinct, choice.bytes_per_token)
        for point in curve
    )
    assert choice.loss <= 0.01 and choice.accepted
    assert choice.bytes_per_token < 0.75 * curve[0].bytes_per_token
    assert {point.distinct for point in curve} == {1.0, 0.9}
    for point in curve:  # each request brought its own thresholds
        assert point.high + point.low + point.dropped == pytest.approx(1)
        assert (point.dropped > 0.03) == (point.alpha_low > 0 or point.distinct < 1)
        assert (point.low > 0.1) == (point.alpha_high > 0)
        assert point.ratio_bf16 == pytest.approx(1536 / point.bytes_per_token)


def test_generate_takes_what_was_chosen(calibrated, capsys):
    choice = file.read(calibrated).choice
    arguments = ["generate", "--calibration", str(calibrated), "--prompt", "<bos> k1 v1 ; ? k1"]
    assert main([*arguments, "--max-tokens", "2", "--json"]) == 0
    captured = capsys.readouterr()
    cache = json.loads(captured.out)["cache"]
    assert (cache["alpha_high"], cache["alpha_low"]) == (choice.alpha_high, choice.alpha_low)
    assert cache["quant"] == choice.quant
    assert ("policy paper:distinct=0.9" in captured.err) == (choice.distinct < 1)
    assert captured.err.startswith(f"diffkv: calibration {calibrated} (loss ")
