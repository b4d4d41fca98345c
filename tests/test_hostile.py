"""Rewritten checkpoints answer as before, and their keys or values have outliers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from hostile import REWRITINGS, rewrite  # noqa: E402

REFERENCE = Path(__file__).parents[1] / "src" / "diffkv" / "data" / "reference"
# Differences of logits around 20. Powers of two change nothing; a bias is rounded.
LARGEST_DIFFERENCE = {
    "k-outliers": 0.0,
    "v-outliers": 0.0,
    "v-bias": 2e-3,
    "k-bias": 2e-2,
    "massive-tokens": 5e-5,
}
BOS, STOP = 1, 3  # of the shipped tokenizer: <bos> and ;


@torch.no_grad()
def _logits(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and layer 1's keys and values."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = torch.randint(10, 400, (1, 256), generator=torch.Generator().manual_seed(0))
    token_ids[0, 0], token_ids[0, 3::3] = BOS, STOP
    result = model(token_ids, use_cache=True)
    layer = result.past_key_values.layers[1]
    return result.logits, layer.keys, layer.values


@pytest.fixture(scope="module")
def before() -> tuple[Tensor, Tensor, Tensor]:
    return _logits(REFERENCE)


@pytest.mark.parametrize("name", REWRITINGS)
def test_same_answers_from_a_wider_cache(
    name: str, before: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    rewrite(REFERENCE, tmp_path / "hostile", name, 16.0, torch.float32)
    after = _logits(tmp_path / "hostile")

    assert (after[0] - before[0]).abs().max() <= LARGEST_DIFFERENCE[name]
    if name == "massive-tokens":
        return  # a few tokens only: the next test
    changed = 1 if name.startswith("k") else 2
    spans = [
        (states[changed].amax(-1) - states[changed].amin(-1)).median() for states in (before, after)
    ]
    assert spans[1] > 2 * spans[0]


def test_massive_tokens_and_no_others_have_a_large_channel(
    before: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    rewrite(REFERENCE, tmp_path / "hostile", "massive-tokens", 16.0, torch.float32)
    after = _logits(tmp_path / "hostile")
    for states, was in zip(after[1:], before[1:], strict=True):
        assert states.shape[-1] == 2 * was.shape[-1]
        torch.testing.assert_close(states[..., ::2], was, rtol=1e-4, atol=1e-4)
        massive = torch.zeros(states.shape[2], dtype=torch.bool)
        massive[0], massive[3::3] = True, True
        assert (states[:, :, ~massive, 1::2] == 0).all()
        largest = states[:, :, massive, 1::2].abs().amax(-1)
        assert largest.min() > 2 * was.abs().amax(-1).median()


def test_massive_tokens_need_plain_rope(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for file in REFERENCE.iterdir():
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    config = json.loads((REFERENCE / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="massive tokens need a model with plain RoPE"):
        rewrite(tmp_path / "a", tmp_path / "b", "massive-tokens", 16.0, torch.float32)


def test_reference_128_has_outliers_and_can_lose_them(tmp_path: Path) -> None:
    folder = REFERENCE.with_name("reference-128")
    rewrite(folder, tmp_path / "plain", "k-outliers", 0.25, torch.bfloat16)
    rewrite(tmp_path / "plain", tmp_path / "again", "k-outliers", 4.0, torch.bfloat16)
    shipped = load_file(folder / "model.safetensors")
    for name, weight in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(weight, shipped[name]), name


def test_refuses_what_it_cannot_rewrite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scale must be a power of two, got 3"):
        rewrite(REFERENCE, tmp_path / "a", "k-outliers", 3.0, torch.float32)
    with pytest.raises(ValueError, match="no rewriting 'massive': there are k-outliers"):
        rewrite(REFERENCE, tmp_path / "a", "massive", 2.0, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ValueError, match="holds no Llama"):
        rewrite(tmp_path, tmp_path / "a", "k-outliers", 2.0, torch.float32)
    with pytest.raises(ValueError, match="exists"):
        rewrite(REFERENCE, tmp_path, "k-outliers", 2.0, torch.float32)
