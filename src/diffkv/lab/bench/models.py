"""Models to measure engines with: sizes of known models as data, weights at random.

The time of a step hardly depends on what weights say, but the tiers that DiffKV chooses do: attention of
a checkpoint that is written here is about as peaked as that of a trained model's heads, so that some
tokens of every head stay high. Models that are too large to write get vLLM's dummy weights, whose
attention is flat; their rows say so.
"""

import json
import math
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffkv.quant import ConfigError

__all__ = ["MODELS", "PAPER_MODELS", "write_model"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
MAX_WRITTEN_PARAMETERS = 1_000_000_000
QUERY_KEY_STD = 1.5
"""Standard deviation of elements of queries and keys; that of attention's scores is then 2.25."""
LOGIT_STD = 4.0


def _llama(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _qwen2(
    layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int
) -> dict[str, Any]:
    kind = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0}
    return _llama(layers, hidden, inner, heads, kv_heads, vocabulary, **kind)


MODELS = {
    "bench-tiny": _llama(2, 256, 512, 4, 2, 512),
    "bench-small": _llama(8, 1024, 2816, 16, 4, 32000),
    "llama-3-8b": _llama(32, 4096, 14336, 32, 8, 128256),
    "llama-3-70b": _llama(80, 8192, 28672, 64, 8, 128256),
    "qwen2.5-7b": _qwen2(28, 3584, 18944, 28, 4, 152064),
    "qwen2.5-32b": _qwen2(64, 5120, 27648, 40, 8, 152064),
}
"""`config.json` by name, as the models' own files have it."""

PAPER_MODELS = (
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-32B-Instruct",
    "Qwen/QwQ-32B",
    "meta-llama/Meta-Llama-3-70B-Instruct",
)
"""Those that the original system's throughput was measured with."""


def find(name: str) -> dict[str, Any]:
    """A model's `config.json`.

    Raises:
        ConfigError: there is no such model.
    """
    if name not in MODELS:
        raise ConfigError(f"--random-weights must be one of {', '.join(MODELS)}, got {name}")
    return MODELS[name]


def write_model(name: str, folder: Path) -> str:
    """Write a model's configuration, a tokenizer, and weights unless they are too many.

    The tokenizer is the shipped model's, and knows fewer words than most vocabularies have.

    Returns:
        vLLM's `load_format` for it.
    """
    config = find(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for file in TOKENIZER_FILES:
        shutil.copy(str(files("diffkv") / "data" / "reference" / file), folder)
    shapes = _weight_shapes(config)
    if sum(math.prod(shape) for shape in shapes.values()) > MAX_WRITTEN_PARAMETERS:
        return "dummy"
    generator = torch.Generator().manual_seed(0)
    weights = {name: _random(name, shape, generator) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return "safetensors"


def _weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{part}.weight": s for part, s in layer.items()}
    return shapes


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep the scale of what flows through them."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    std = 1.0 if "embed_tokens" in name else 1 / math.sqrt(shape[-1])
    if "lm_head" in name:
        std *= LOGIT_STD
    elif ".q_proj." in name or ".k_proj." in name:
        std *= QUERY_KEY_STD
    return (torch.randn(shape, generator=generator) * std).to(torch.bfloat16)
