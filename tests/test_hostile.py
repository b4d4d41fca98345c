"""Rewritten checkpoints answer as before, and their keys or values have outliers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffkv.evaluation.hostile import REWRITINGS, rewrite
from diffkv.quant import ConfigError

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

REFERENCE = Path(__file__).parents[1] / "src" / "diffkv" / "data" / "reference"
# Differences of logits around 20. Powers of two change nothing; a bias is rounded.
LARGEST_DIFFERENCE = {"k-outliers": 0.0, "v-outliers": 0.0, "v-bias": 2e-3, "k-bias": 2e-2}


@torch.no_grad()
def _logits(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and layer 1's keys and values."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = torch.randint(10, 400, (1, 256), generator=torch.Generator().manual_seed(0))
    result = model(token_ids, use_cache=True)
    layer = result.past_key_values.layers[1]
    return result.logits, layer.keys, layer.values


@pytest.fixture(scope="module")
def before() -> tuple[Tensor, Tensor, Tensor]:
    return _logits(REFERENCE)


@pytest.mark.parametrize("name", list(REWRITINGS))
def test_same_answers_from_a_wider_cache(
    name: str, before: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    rewrite(REFERENCE, tmp_path / "hostile", name, 16.0, torch.float32)
    after = _logits(tmp_path / "hostile")

    assert (after[0] - before[0]).abs().max() <= LARGEST_DIFFERENCE[name]
    changed = 1 if name.startswith("k") else 2
    spans = [
        (states[changed].amax(-1) - states[changed].amin(-1)).median() for states in (before, after)
    ]
    assert spans[1] > 2 * spans[0]


def test_reference_128_has_outliers_and_can_lose_them(tmp_path: Path) -> None:
    folder = REFERENCE.with_name("reference-128")
    rewrite(folder, tmp_path / "plain", "k-outliers", 0.25, torch.bfloat16)
    rewrite(tmp_path / "plain", tmp_path / "again", "k-outliers", 4.0, torch.bfloat16)
    shipped = load_file(folder / "model.safetensors")
    for name, weight in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(weight, shipped[name]), name


def test_refuses_what_it_cannot_rewrite(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scale must be a power of two, got 3"):
        rewrite(REFERENCE, tmp_path / "a", "k-outliers", 3.0, torch.float32)
    with pytest.raises(ConfigError, match="no rewriting 'massive': there are k-outliers"):
        rewrite(REFERENCE, tmp_path / "a", "massive", 2.0, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ConfigError, match="holds no Llama"):
        rewrite(tmp_path, tmp_path / "a", "k-outliers", 2.0, torch.float32)
    with pytest.raises(ConfigError, match="exists"):
        rewrite(REFERENCE, tmp_path, "k-outliers", 2.0, torch.float32)
