"""Scales fit small elements, and elements that no scale fits are said, once."""

import re
import warnings
from importlib.resources import files

import pytest
import torch

from diffkv import reference
from diffkv.kernels import cpu
from diffkv.quant import FLOAT16_MAX
from diffkv.value_range import LEAST, ValueRange


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("magnitude", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_small_elements_keep_their_relative_error(bits, magnitude):
    """Within 5 % of the vector beside what the same vector loses at a magnitude of 1."""
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))

    def loss(x):
        back = reference.dequantize(*reference.quantize(x, bits, 1), bits, torch.float32)
        return float((back - x).norm() / x.norm())

    assert loss(x * magnitude) < loss(x) + 0.05
    if magnitude >= 1e-4:
        assert loss(x * magnitude) < loss(x) + 0.002


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_small_scales_are_bit_exact(bits):
    x = torch.randn(400, 64) * torch.logspace(-9, -1, 400)[:, None]
    codes, meta = cpu.quantize(x, bits, 2)
    expected, expected_meta = reference.quantize(x, bits, 2)
    assert torch.equal(meta, expected_meta) and torch.equal(codes, expected)
    back = cpu.dequantize(codes, meta, bits, torch.float32)
    assert torch.equal(back, reference.dequantize(codes, meta, bits, torch.float32))


def looked(key, value, k_bits=4, v_bits=2, centred=False):
    watch = ValueRange(2, torch.device("cpu"), k_bits, v_bits, centred)
    watch.look(1, key, value)
    return watch


def test_what_keys_have_in_common_is_said_where_their_codes_are_few():
    """A bias of two channels as in Qwen2.5, on keys that differ as those of a trained model."""
    keys = torch.randn(500, 2, 64, generator=torch.Generator().manual_seed(0)) * 3
    values = torch.randn(500, 2, 64)
    assert looked(keys, values).problem() is None
    keys[:, 1, -2:] += 150
    assert re.search("keys of layer 1 .* norm 212 in common", looked(keys, values).problem())
    assert looked(keys, values, centred=True).problem() is None
    assert looked(keys, values, k_bits=8).problem() is None
    assert looked(keys, values, k_bits=16).problem() is None


ONES = torch.ones(3, 2, 64)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (ONES * 1e5, ONES, "keys of layer 1 have elements up to 1e.05"),
        (ONES, ONES * float("inf"), "values of layer 1 have elements up to inf"),
        (ONES * float("nan"), ONES, "keys of layer 1"),
        (ONES, ONES * 1e-7, "values of layer 1 .* hardly told apart"),
    ],
)
def test_what_does_not_fit_is_said_once(key, value, words):
    watch = looked(key, value)
    assert re.search(words, watch.problem())
    watch.look(1, key, value)
    assert watch.problem() is None


def test_what_fits_or_is_not_quantised_is_not_said():
    both = ONES * torch.tensor([-1, 0, 1])[:, None, None]
    assert looked(both * FLOAT16_MAX, ONES * LEAST).problem() is None
    assert looked(ONES * 0, ONES * 0).problem() is None
    assert looked(ONES * 1e9, ONES, k_bits=16).problem() is None


def test_a_transformers_cache_warns():
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    from diffkv import hf

    folder = files("diffkv") / "data" / "reference"
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    hf.attach(model.eval())
    ids = torch.arange(10, 30)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        cache = hf.DiffKVHFCache(model, "k8v4-k4v2", max_tokens=64)
        model(ids, past_key_values=cache)
        hf.feed(model, cache, ids[:, :2])
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1e6)
        cache = hf.DiffKVHFCache(model, "k8v4-k4v2", max_tokens=64)
        model(ids, past_key_values=cache)
        with pytest.warns(UserWarning, match="values of layer 1 have elements up to"):
            hf.feed(model, cache, ids[:, :1])
