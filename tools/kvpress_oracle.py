"""Record what kvpress says of one small attention layer: tests compare our policies with it.

kvpress wants an older transformers than this package, so it runs in an environment of its own:

    python3 -m venv /tmp/kvpress && /tmp/kvpress/bin/pip install kvpress==0.5.5 torch safetensors
    /tmp/kvpress/bin/python tools/kvpress_oracle.py tests/data/kvpress.safetensors

The layer has a KV head for every query head: where heads share one, SnapKV takes the mean of their
attention, and the published rule of DiffKV the largest.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import (
    AdaKVPress,
    KeyDiffPress,
    ObservedAttentionPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

NUM_HEADS, HEAD_DIM, NUM_TOKENS, WINDOW, SINKS = 3, 16, 160, 64, 4
RATIO = 0.4  # of the tokens is dropped


def make_layer() -> tuple[LlamaAttention, LlamaRotaryEmbedding]:
    """An attention layer of random weights, and its rotary embedding."""
    config = LlamaConfig(
        hidden_size=NUM_HEADS * HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        num_key_value_heads=NUM_HEADS,
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    layer = LlamaAttention(config, layer_idx=0).eval()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.4)  # attention that is not flat
    return layer, LlamaRotaryEmbedding(config)


def kept(press: ScorerPress, scores: Tensor) -> Tensor:
    """Which tokens stay, [num_heads, num_tokens], as `ScorerPress.compress` takes them."""
    num_kept = int(NUM_TOKENS * (1 - press.compression_ratio))
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    return keep.scatter(-1, scores.topk(num_kept, dim=-1).indices, True)[0]


@torch.no_grad()
def record() -> dict[str, Tensor]:
    """Queries and keys of a layer, and what each press says of them."""
    torch.manual_seed(0)
    layer, rotary = make_layer()
    hidden = torch.randn(1, NUM_TOKENS, NUM_HEADS * HEAD_DIM)
    embeddings = rotary(hidden, torch.arange(NUM_TOKENS)[None])
    query, key, value = (
        project(hidden).view(1, NUM_TOKENS, NUM_HEADS, HEAD_DIM).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *embeddings)
    mask = torch.full((NUM_TOKENS, NUM_TOKENS), -torch.inf).triu(1)[None, None]
    _, attention = layer(hidden, position_embeddings=embeddings, attention_mask=mask)
    more = {"position_embeddings": embeddings}

    presses = {
        "snapkv": SnapKVPress(RATIO, window_size=WINDOW, kernel_size=1),
        "observed": ObservedAttentionPress(RATIO),
        "keydiff": KeyDiffPress(RATIO),
        "streaming": StreamingLLMPress(RATIO, n_sink=SINKS),
    }
    found = {"query": query[0], "key": key[0]}
    for name, press in presses.items():
        seen = attention if name == "observed" else None
        scores = press.score(layer, hidden, key, value, seen, more)
        found[f"{name}_scores"], found[f"{name}_kept"] = scores[0].float(), kept(press, scores)
    layer.config._attn_implementation = "sdpa"  # AdaKVPress wants it said, and does not use it here
    AdaKVPress(presses["snapkv"], alpha_safeguard=0.0).compress(
        layer, hidden, key, value, None, more
    )
    masked = torch.zeros(1, NUM_HEADS, NUM_TOKENS, dtype=torch.bool)
    masked[layer.masked_key_indices] = True
    found["adakv_kept"] = ~masked[0]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    facts = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    facts |= {"window": str(WINDOW), "sinks": str(SINKS), "ratio": str(RATIO)}
    save_file(record(), out, metadata=facts)


if __name__ == "__main__":
    main()
