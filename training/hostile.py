"""Rewrites a Llama checkpoint so that its cache is hard to quantise, while its answers stay the same.

    python training/hostile.py src/diffkv/data/reference-128 OUT k-outliers --scale 16

Large models have channels of keys that are many times larger than the others (KIVI, Liu et al. 2024;
KVQuant, Hooper et al. 2024); small models have fewer. A rewriting adds some. By name:

    k-outliers  two RoPE pairs of every KV head: keys x s, queries x 1/s
    v-outliers  four channels of every KV head: values x s, their columns of the output projection x 1/s
    v-bias      a constant added to all values, taken off again by the output projection's bias:
                attention probabilities sum to 1
    k-bias      a constant added to the keys of the slowest RoPE pair, whose keys are x 8, queries x 1/8
    massive-tokens  one channel of the first token's and of stops' keys and values, s times as large as
                the largest others, in heads of twice the channels (`massive.py`)

s is a power of two, so that the first two change no rounding: logits are equal as far as sums are
taken in the same order, and 1/s takes s back. `v-bias` and `massive-tokens` are exact up to rounding.
`k-bias` is not: RoPE turns the constant b by the distance d of two tokens, so a score changes by about
|q| |b| f d at the slowest frequency f.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from massive import hidden_rms, widen_and_mark
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]

NUM_PAIRS = 2
NUM_VALUE_CHANNELS = 4
BIAS_SCALE = 8.0
STOPS = (".", ";")
"""Tokens that end a sentence or a fact."""


def _by_head(weight: Tensor, head_dim: int) -> Tensor:
    """A view of a projection's rows as [heads, head_dim, hidden_size]."""
    return weight.view(-1, head_dim, weight.shape[-1])


def _attention(weights: Weights, config: dict[str, Any], layer: int) -> tuple[Tensor, ...]:
    """Views of a layer's projections; D is head_dim, H hidden_size.

    Returns:
        q [KV heads, group, D, H], k and v [KV heads, D, H], o [H, KV heads, group, D].
    """
    num_kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    prefix = f"model.layers.{layer}.self_attn."
    q, k, v, o = (weights[f"{prefix}{name}_proj.weight"] for name in "qkvo")
    return (
        q.view(num_kv_heads, -1, head_dim, q.shape[-1]),
        _by_head(k, head_dim),
        _by_head(v, head_dim),
        o.view(o.shape[0], num_kv_heads, -1, head_dim),
    )


def _biases(weights: Weights, config: dict[str, Any], layer: int) -> tuple[Tensor, ...]:
    """The biases of a layer's k, v [KV heads, D] and o [H], added where the model has none."""
    prefix = f"model.layers.{layer}.self_attn."
    for name in "qkvo":
        weight = weights[f"{prefix}{name}_proj.weight"]
        weights.setdefault(f"{prefix}{name}_proj.bias", weight.new_zeros(weight.shape[0]))
    config["attention_bias"] = True
    by_head = (config["num_key_value_heads"], config["head_dim"])
    k, v, o = (weights[f"{prefix}{name}_proj.bias"] for name in "kvo")
    return k.view(by_head), v.view(by_head), o


def _scale_pair(q: Tensor, k: Tensor, head: int, pair: int, scale: float) -> None:
    """Multiply one RoPE pair of a head's keys, and divide that of its queries. In place."""
    channels = [pair, pair + k.shape[1] // 2]
    k[head, channels] *= scale
    q[head, :, channels] /= scale


def _k_outliers(weights: Weights, config: dict[str, Any], layer: int, scale: float) -> None:
    q, k, _, _ = _attention(weights, config, layer)
    pair_norms = k.float().norm(dim=-1).unflatten(1, (2, -1)).norm(dim=1)
    for head, pairs in enumerate(pair_norms.topk(NUM_PAIRS).indices.tolist()):
        for pair in pairs:
            _scale_pair(q, k, head, pair, scale)


def _v_outliers(weights: Weights, config: dict[str, Any], layer: int, scale: float) -> None:
    _, _, v, o = _attention(weights, config, layer)
    largest = v.float().norm(dim=-1).topk(NUM_VALUE_CHANNELS).indices
    for head, channels in enumerate(largest.tolist()):
        v[head, channels] *= scale
        o[:, head, :, channels] /= scale


def _v_bias(weights: Weights, config: dict[str, Any], layer: int, scale: float) -> None:
    _, v, o_bias = _biases(weights, config, layer)
    _, _, _, o = _attention(weights, config, layer)
    generator = torch.Generator().manual_seed(layer)
    constant = torch.randn(v.shape, generator=generator).mul(scale).to(v.dtype)
    v += constant
    o_bias -= torch.einsum("hngd,nd->h", o.float(), constant.float()).to(o_bias.dtype)


def _k_bias(weights: Weights, config: dict[str, Any], layer: int, scale: float) -> None:
    q, k, _, _ = _attention(weights, config, layer)
    k_bias, _, _ = _biases(weights, config, layer)
    slowest = config["head_dim"] // 2 - 1
    for head in range(len(k)):
        _scale_pair(q, k, head, slowest, BIAS_SCALE)
    k_bias[:, slowest] += scale


def _massive_tokens(folder: Path, weights: Weights, config: dict[str, Any], scale: float) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    stops = [vocabulary[stop] for stop in STOPS if stop in vocabulary]
    token_ids = [config["bos_token_id"], *stops]
    widen_and_mark(weights, config, token_ids, hidden_rms(folder, token_ids), scale)


BY_LAYER: dict[str, Callable[[Weights, dict[str, Any], int, float], None]] = {
    "k-outliers": _k_outliers,
    "v-outliers": _v_outliers,
    "v-bias": _v_bias,
    "k-bias": _k_bias,
}
"""Rewritings of one layer at a time: (weights, configuration, layer, scale) changes both in place."""

REWRITINGS = (*BY_LAYER, "massive-tokens")
"""Every rewriting by name."""


def rewrite(folder: Path, out: Path, name: str, scale: float, dtype: torch.dtype) -> None:
    """Copy a model's folder to `out`, which it creates, with its weights rewritten.

    Args:
        folder: of a Llama in one `model.safetensors`, with config.json.
        out: where to; must not exist.
        name: of a rewriting.
        scale: how large the outliers are; a power of two.
        dtype: of the written weights; a bias in 16 bits is rounded.

    Raises:
        ValueError: an unknown name, a scale that is no power of two, another kind of model, or `out`
            exists.
    """
    if name not in REWRITINGS:
        raise ValueError(f"no rewriting {name!r}: there are {', '.join(REWRITINGS)}")
    if scale <= 0 or not torch.tensor(scale).log2().frac() == 0:
        raise ValueError(f"scale must be a power of two, got {scale}")
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llama" or not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no Llama with one model.safetensors")
    weights = {key: w.to(dtype) for key, w in load_file(folder / "model.safetensors").items()}
    if name in BY_LAYER:
        for layer in range(config["num_hidden_layers"]):
            BY_LAYER[name](weights, config, layer, scale)
    else:
        _massive_tokens(folder, weights, config, scale)
    config["dtype"] = str(dtype).removeprefix("torch.")
    try:
        shutil.copytree(folder, out)
    except FileExistsError:
        raise ValueError(f"{out} exists: name a new folder") from None
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Parse the command line and rewrite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, help="must not exist")
    parser.add_argument("rewriting", choices=REWRITINGS)
    parser.add_argument("--scale", type=float, default=16.0, help="a power of two")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    rewrite(args.folder, args.out, args.rewriting, args.scale, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
