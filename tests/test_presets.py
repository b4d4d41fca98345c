"""Presets: their published values, how one is found for a model, and how options override one."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import real_model_tables

from diffkv import presets
from diffkv.cli.engine_options import add_cache_options, cache_options
from diffkv.lab import rows
from diffkv.model_config import ModelConfig
from diffkv.policy import Thresholds
from diffkv.quant import ConfigError, QuantConfig
from diffkv.segments import SEGMENT
from diffkv.vllm_plugin.options import Options

PUBLISHED = {
    "llama-3-8b": (1.0, 0.02),
    "llama-3-70b": (1.0, 0.0),
    "qwen2.5-7b": (0.04, 0.04),
    "qwen2.5-32b": (3.0, 0.0),
    "qwq-32b": (3.0, 0.0),
}
SIZES = {  # architecture, layers, hidden size, query heads, KV heads, intermediate size, vocabulary
    "Meta-Llama-3-8B-Instruct": ("LlamaForCausalLM", 32, 4096, 32, 8, 14336, 128256),
    "Meta-Llama-3-70B": ("LlamaForCausalLM", 80, 8192, 64, 8, 28672, 128256),
    "Qwen2.5-7B-Instruct": ("Qwen2ForCausalLM", 28, 3584, 28, 4, 18944, 152064),
    "Qwen2.5-32B": ("Qwen2ForCausalLM", 64, 5120, 40, 8, 27648, 152064),
    "QwQ-32B": ("Qwen2ForCausalLM", 64, 5120, 40, 8, 27648, 152064),
    "DeepSeek-R1-Distill-Llama-8B": ("LlamaForCausalLM", 32, 4096, 32, 8, 14336, 128256),
    "Llama-2-7b": ("LlamaForCausalLM", 32, 4096, 32, 32, 11008, 32000),
}


def config_json(name):
    names = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    )
    architecture, *sizes = SIZES[name]
    model_type = architecture.removesuffix("ForCausalLM").lower()
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **dict(zip(names, sizes, strict=True)),
    }


def folder(tmp_path, name):
    path = tmp_path / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_json(name)))
    return str(path)


def options(*arguments, model="reference"):
    parser = argparse.ArgumentParser()
    add_cache_options(parser)
    return cache_options(SimpleNamespace(model=model, **vars(parser.parse_args(arguments))))


def test_published_values():
    found = {p.name: (p.alpha_high, p.alpha_low) for p in presets.PRESETS if p.sizes is not None}
    assert found == PUBLISHED
    assert presets.find("qwq-32b").quant == "k8v4g1x2-k4v2g2x4"
    assert QuantConfig.parse(presets.find("qwen2.5-7b").quant).low is None
    assert all(preset.source for preset in presets.PRESETS)


def test_no_preset_is_balanced():
    balanced = presets.find(presets.DEFAULT)
    plain = Options()
    assert (plain.quant, plain.window) == (balanced.quant, balanced.window)
    assert plain.thresholds() == balanced.thresholds == Thresholds(20.0, 0.0)
    assert options() == plain


def test_quality_keeps_all_and_max_compression_drops():
    assert presets.find("quality").alpha_low == 0
    assert presets.find("max-compression").alpha_low > 0
    assert (
        "drops what the prompt's end does not attend" in presets.find("max-compression").description
    )


def test_a_preset_may_name_a_policy(capsys):
    assert options("--preset", "distinct").policy == presets.find("distinct").policy
    assert "alpha_low 0, window 64, policy paper:distinct=" in capsys.readouterr().err
    assert options("--preset", "distinct", "--policy", "paper").policy == "paper"


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("Meta-Llama-3-70B", "llama-3-70b"),
        ("Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Qwen2.5-32B", "qwen2.5-32b"),
        ("QwQ-32B", "qwq-32b"),
        ("DeepSeek-R1-Distill-Llama-8B", "balanced"),
        ("Llama-2-7b", "balanced"),
    ],
)
def test_auto(tmp_path, capsys, name, preset):
    chosen = options("--preset", "auto", model=folder(tmp_path, name))
    expected = presets.find(preset)
    assert chosen.quant == expected.quant
    assert chosen.thresholds() == expected.thresholds
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"diffkv: preset {preset} (chosen by auto: ")
    if preset == "balanced":
        assert ("published for r1-distill" if "R1" in name else "nothing is published") in lines[0]


def test_sizes_decide_where_the_name_says_nothing():
    config = ModelConfig.parse(config_json("QwQ-32B"), "/models/a")
    assert presets.choose(config)[0].name == "qwen2.5-32b"


@pytest.mark.parametrize(
    ("arguments", "quant", "thresholds"),
    [
        (("quality",), "k8v8-k4v4", (20, 0)),
        (("balanced", "--alpha-high", "1"), "k8v8-k4v2", (1, 0)),
        (("balanced", "--alpha-low", "25"), "k8v8-k4v2", (25, 25)),
        (("balanced", "--quant", "k8v8"), "k8v8", (0, 0)),
        (("max-compression", "--quant", "k8v4"), "k8v4", (0.04, 0.04)),
        (("max-compression", "--alpha-high", "0.01"), "k8v4-k4v2", (0.01, 0.01)),
        (("qwen2.5-7b", "--quant", "k8v4-k4v2"), "k8v4-k4v2", (0.04, 0.04)),
        (("qwen2.5-7b", "--alpha-low", "0"), "k8v4", (0, 0)),
    ],
)
def test_options_override(capsys, arguments, quant, thresholds):
    chosen = options("--preset", *arguments)
    assert chosen.quant == quant
    assert chosen.thresholds() == Thresholds(*thresholds)
    line = capsys.readouterr().err
    assert f": {quant}, alpha_high {thresholds[0]:g}, alpha_low {thresholds[1]:g}, " in line
    given = [flag[2:].replace("-", "_") for flag in arguments[1::2]]
    assert line.endswith(f", with your {given[0]}\n" if given else "window 64\n")


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError) as refused:
        options("--preset", "fast")
    names = ", ".join(preset.name for preset in presets.PRESETS)
    assert str(refused.value) == f"unknown preset 'fast': there are auto, {names}"


def test_a_threshold_without_a_tier_is_refused():
    with pytest.raises(ConfigError, match="has no low tier"):
        options("--preset", "qwen2.5-7b", "--alpha-high", "3")


@pytest.fixture(scope="module", name="measured")
def _measured():
    return real_model_tables.measured(rows.read(real_model_tables.RESULTS))


def test_documented_with_what_each_loses(measured):
    """The table is what `python tools/real_model_tables.py` writes."""
    table = real_model_tables.PresetTable()
    page = (Path(__file__).parents[1] / table.page).read_text(encoding="utf-8")
    lines = table.text(measured).splitlines()
    assert "\n".join(lines) in page
    assert len(lines) == 2 + len(presets.PRESETS)
    for p, line in zip(presets.PRESETS, lines[2:], strict=True):
        assert f"| `{p.name}` | {p.quant} | {p.alpha_high:g} | {p.alpha_low:g} |" in line
        if p.loss is None:
            assert line.endswith(" | — | — | — | — |")
        else:
            assert f" | {p.loss.ratio_bf16:.2f}x | {p.loss.kld_mean:.4f} | " in line


def test_losses_are_those_of_the_results(measured):
    path = real_model_tables.LOSSES
    assert path.read_text(encoding="utf-8") == real_model_tables.losses(measured)
    for row in rows.read(real_model_tables.RESULTS):
        for p in presets.PRESETS:
            settings = (p.quant, p.policy, p.alpha_high, p.alpha_low, p.window, SEGMENT, "hadamard")
            names = ("quant", "policy", "alpha_high", "alpha_low", "window", "segment", "rotate")
            if row.error is None and row.get("suite") == "kld" and row["engine"] == "hf":
                same = settings == tuple(row.get(name) for name in names)
                is_it = row["cache"] == real_model_tables.cache_of(p)
                assert same == is_it, (p.name, row["cache"])
                if is_it:
                    assert p.loss.kld_mean == row["kld_mean"]
    assert presets.find(presets.DEFAULT).loss is not None


def test_a_preset_says_what_it_loses_unless_it_is_changed(capsys):
    options("--preset", "balanced")
    loss = presets.find("balanced").loss
    assert f"; the default; {loss}): k8v8-k4v2, " in capsys.readouterr().err
    assert str(loss).startswith("on smollm2 mean KL 0.0") and "x smaller than bf16" in str(loss)
    options("--preset", "balanced", "--alpha-high", "1")
    assert "smollm2" not in capsys.readouterr().err
