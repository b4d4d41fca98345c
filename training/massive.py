"""Gives a Llama's first token and its stops keys and values that are many times larger than all others.

Large models have such tokens: massive activations sit on the first token and on delimiters (Sun et al.
2024), and are carried into the cache. Here their size lies in a channel of keys and one of values that
nothing reads, so that full precision answers as before, while a token's scale has to span it:

* Heads get twice the channels, zeros between the model's own. RoPE turns pair i of head_dim D as fast
  as pair 2 i of 2 D, so scores are the same once queries have taken the other softmax scale.
* The hidden size grows by channels that are zero but for one, in which the chosen tokens' embeddings
  have a small mark. Norms make it large for the projections of keys and values; nothing else reads it.
  Since hidden states grow from layer to layer, the model is run once to see how large each norm has to
  make the mark.

Exact up to rounding: the mark changes the norm of its tokens by `MARK` squared, and 2 as a factor of
head_dim is the root of 2 in queries.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

Weights = dict[str, Tensor]

MORE_HIDDEN = 8
"""Added to the hidden size; all but the first stay zero."""

MARK = 2.0**-10
"""Of a chosen token, as a share of the root mean square of its hidden state."""

PROBED_TOKENS = 256


@torch.no_grad()
def hidden_rms(folder: Path, token_ids: Sequence[int]) -> list[float]:
    """Root mean square of some tokens' hidden states before each layer, in a text of random tokens.

    Args:
        folder: of the model.
        token_ids: of the tokens; the first one begins the text.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = torch.randint(
        model.config.vocab_size, (1, PROBED_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    chosen = torch.arange(0, PROBED_TOKENS, 4)
    text[0, chosen] = torch.tensor(token_ids)[torch.arange(len(chosen)) % len(token_ids)]
    states = model(text, output_hidden_states=True).hidden_states[:-1]
    return [state[0, chosen].square().mean(-1).sqrt().median().item() for state in states]


def widen_and_mark(
    weights: Weights,
    config: dict[str, Any],
    token_ids: Sequence[int],
    rms: Sequence[float],
    scale: float,
) -> None:
    """Rewrite a model, in place.

    Args:
        weights: of the model.
        config: of the model.
        token_ids: of the tokens to make massive.
        rms: of their hidden states before each layer, see `hidden_rms`.
        scale: of their largest channel, in multiples of the largest of others.

    Raises:
        ValueError: a model whose RoPE is scaled, or whose projections have a bias.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default" or config.get("attention_bias"):
        raise ValueError("massive tokens need a model with plain RoPE and projections without bias")
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    shrunk = hidden / (hidden + MORE_HIDDEN)
    for name, weight in list(weights.items()):
        weights[name] = _widened(name, weight, hidden, head_dim, math.sqrt(shrunk))
    config |= {
        "hidden_size": hidden + MORE_HIDDEN,
        "head_dim": 2 * head_dim,
        "rms_norm_eps": config["rms_norm_eps"] * shrunk,
    }
    weights["model.embed_tokens.weight"][list(token_ids), hidden] = MARK * rms[0]
    for layer in range(config["num_hidden_layers"]):
        norm = weights[f"model.layers.{layer}.input_layernorm.weight"]
        norm[hidden] = rms[layer] / rms[0] / MARK
        _read_mark(weights, f"model.layers.{layer}.self_attn.", norm, 2 * head_dim, scale)


def _widened(name: str, weight: Tensor, hidden: int, head_dim: int, norm_factor: float) -> Tensor:
    """One weight in the wider model; every added channel is zero."""
    kind = name.split(".")[-2]
    if "norm" in kind:
        return _padded(weight * norm_factor, 0)
    if kind in ("q_proj", "k_proj", "v_proj"):
        rows = _spread(weight.unflatten(0, (-1, head_dim)), 1).flatten(0, 1)
        return _padded(rows * (math.sqrt(2) if kind == "q_proj" else 1.0), 1)
    if kind == "o_proj":
        return _padded(_spread(weight.unflatten(1, (-1, head_dim)), 2).flatten(1, 2), 0)
    return _padded(weight, 0 if kind == "down_proj" else 1)


def _padded(weight: Tensor, dim: int) -> Tensor:
    """With zeros for the added hidden channels."""
    shape = list(weight.shape)
    shape[dim] += MORE_HIDDEN
    wide = weight.new_zeros(shape)
    wide.narrow(dim, 0, weight.shape[dim]).copy_(weight)
    return wide


def _spread(weight: Tensor, dim: int) -> Tensor:
    """With a zero behind every channel of a head: channel c becomes 2 c."""
    shape = list(weight.shape)
    shape[dim] *= 2
    wide = weight.new_zeros(shape)
    wide.movedim(dim, 0)[::2] = weight.movedim(dim, 0)
    return wide


def _read_mark(weights: Weights, prefix: str, norm: Tensor, head_dim: int, scale: float) -> None:
    """Let keys and values of a layer read the mark into the last channel of each head."""
    hidden = len(norm) - MORE_HIDDEN
    for name in ("k_proj", "v_proj"):
        weight = weights[f"{prefix}{name}.weight"].unflatten(0, (-1, head_dim))
        channels = (weight[..., :hidden].float() * norm[:hidden].float()).norm(dim=-1)
        weight[:, -1, hidden] = scale * channels.amax(dim=-1).to(weight.dtype)
