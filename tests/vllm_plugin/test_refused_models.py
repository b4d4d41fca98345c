"""Models that DiffKV cannot serve end `diffkv serve` in one line, from their configuration alone."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from diffkv.cli import main


@pytest.mark.parametrize(
    ("config", "architecture", "settings", "flags", "message"),
    [
        ("DeepseekV2Config", "DeepseekV2ForCausalLM", {"num_hidden_layers": 2}, [], "MLA models"),
        ("BloomConfig", "BloomForCausalLM", {"n_layer": 2, "hidden_size": 64}, [], "ALiBi"),
        ("FalconConfig", "FalconForCausalLM", {"num_hidden_layers": 2, "alibi": True}, [], "ALiBi"),
        (
            "MistralConfig",
            "MistralForCausalLM",
            {"num_hidden_layers": 2, "sliding_window": 128},
            [],
            "a sliding window in every layer: pass --disable-sliding-window",
        ),
        (
            "Gemma2Config",
            "Gemma2ForCausalLM",
            {"num_hidden_layers": 2},
            [],
            "soft cap on attention scores",
        ),
        (
            "Gemma3TextConfig",
            "Gemma3ForCausalLM",
            {"num_hidden_layers": 6},
            ["--disable-hybrid-kv-cache-manager"],
            "--disable-hybrid-kv-cache-manager",
        ),
        (
            "GptOssConfig",
            "GptOssForCausalLM",
            {"num_hidden_layers": 2},
            [],
            "attention sinks",
        ),
        ("JambaConfig", "JambaForCausalLM", {"num_hidden_layers": 8}, [], "Mamba's first version"),
        (
            "Qwen3NextConfig",
            "Qwen3NextForCausalLM",
            {"num_hidden_layers": 4},
            ["--dtype", "float32"],
            "pass --dtype bfloat16",
        ),
        ("MambaConfig", "MambaForCausalLM", {"num_hidden_layers": 2}, [], "full attention"),
        ("WhisperConfig", "WhisperForConditionalGeneration", {}, [], "encoder-decoder models"),
        ("BertConfig", "BertModel", {}, [], "models that do not generate"),
    ],
)
def test_refused_before_a_worker_starts(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config: str,
    architecture: str,
    settings: dict[str, Any],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    made = getattr(transformers, config)(**settings)
    made.architectures = [architecture]
    made.save_pretrained(tmp_path)
    save_file({"unused": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert main(["serve", str(tmp_path), "--max-model-len", "256", *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffkv: ")]
    assert len(lines) == 1
    assert lines[0].startswith("diffkv: DiffKV does not support ")
    assert message in lines[0]


def test_prefix_caching_that_was_asked_for_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    made = transformers.Gemma3TextConfig(num_hidden_layers=6)
    made.architectures = ["Gemma3ForCausalLM"]
    made.save_pretrained(tmp_path)
    save_file({"unused": torch.zeros(1)}, tmp_path / "model.safetensors")
    flags = ["--max-model-len", "256", "--enable-prefix-caching"]
    assert main(["serve", str(tmp_path), *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffkv: ")]
    assert len(lines) == 1
    assert lines[0].endswith("leave out --enable-prefix-caching")
