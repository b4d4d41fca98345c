"""Forced decoding in vLLM: what is written, what is generated, and what a lossless cache loses."""

import numpy as np
import pytest
import torch

from diffkv.cli.engine_options import model_folder
from diffkv.vllm_plugin.front.forcing import Script, forced_engine
from diffkv.vllm_plugin.options import Options

STEPS = 12
LENGTHS = (40, 230, 131)


@pytest.fixture(scope="module")
def arguments():
    return {
        "model": model_folder("reference"),
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_batched_tokens": 128,
        "max_model_len": 512,
        "use_tqdm_on_load": False,
    }


@pytest.fixture(scope="module")
def scripts():
    rng = np.random.default_rng(0)
    return [
        Script(rng.integers(4, 200, length).tolist(), rng.integers(4, 200, STEPS).tolist())
        for length in LENGTHS
    ]


@pytest.fixture(scope="module")
def full(arguments, scripts, tmp_path_factory):
    """Stock vLLM, prompts in chunks: forced, then free."""
    folder = tmp_path_factory.mktemp("stock")
    with forced_engine(arguments, None) as engine:
        forced, use = engine.read(scripts, STEPS, folder / "forced.npy")
        free = [Script(script.prompt, []) for script in scripts]
        own, _ = engine.read(free, STEPS, folder / "free.npy")
    return {
        "forced": np.load(folder / "forced.npy"),
        "free": np.load(folder / "free.npy"),
        "tokens": forced,
        "own": own,
        "use": use,
    }


def test_the_tokens_are_those_given_and_the_distributions_those_of_transformers(full, scripts):
    from transformers import AutoModelForCausalLM

    assert full["tokens"] == [script.tokens for script in scripts]
    model = AutoModelForCausalLM.from_pretrained(model_folder("reference"), dtype=torch.float32)
    for script, ours in zip(scripts, full["forced"], strict=True):
        ids = torch.tensor([script.prompt + script.tokens])
        with torch.no_grad():
            logits = model(ids).logits[0, len(script.prompt) - 1 : -1]
        expected = logits.log_softmax(-1).numpy()
        np.testing.assert_allclose(ours[:, : expected.shape[1]], expected, atol=2e-4)


def test_without_given_tokens_the_likeliest_are_taken(full):
    assert [row.argmax(-1).tolist() for row in full["free"]] == full["own"]
    # the first step follows the same prompt
    np.testing.assert_allclose(full["free"][:, 0], full["forced"][:, 0], atol=1e-5)


def test_bytes_of_its_own_cache_are_whole_blocks(full):
    tokens = [length + STEPS - 1 for length in LENGTHS]
    blocks = sum(-(-num // 128) for num in tokens)
    use = full["use"]
    assert use.tokens == use.high == sum(tokens)
    assert use.num_bytes == blocks * 128 * 2 * use.bf16_bytes / use.tokens
    assert use.nominal_ratio_bf16 == 0.5


def test_a_lossless_cache_has_no_divergence(arguments, scripts, full, tmp_path):
    options = Options(quant="k16v16")
    with forced_engine(arguments, options) as engine:
        tokens, use = engine.read(scripts, STEPS, tmp_path / "ours.npy")
    ours = np.load(tmp_path / "ours.npy")

    assert tokens == full["tokens"] and use.high == use.tokens
    divergence = (np.exp(full["forced"]) * (full["forced"] - ours)).sum(-1)
    assert np.abs(divergence).max() <= 1e-6
    assert np.abs(full["forced"] - ours).max() > 0  # another kernel: both were measured


def test_a_lossy_cache_has_one(arguments, scripts, full, tmp_path):
    with forced_engine(arguments, Options(quant="k4v2")) as engine:
        _, use = engine.read(scripts, STEPS, tmp_path / "ours.npy")
    ours = np.load(tmp_path / "ours.npy")

    divergence = (np.exp(full["forced"]) * (full["forced"] - ours)).sum(-1)
    assert divergence[0, 0] < 1e-6  # after a prompt in one chunk: exact attention
    assert divergence[:, 1:].max() > 1e-4
    assert use.ratio_bf16 > 2
