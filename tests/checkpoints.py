"""Tiny checkpoints in Hugging Face's format: every family and weight format, random, of a fixed seed.

`python tests/checkpoints.py qwen3_moe FOLDER` makes one by hand; `FORMATS` go behind a colon, as in
`llama3:awq`. They have no sense to speak of, but greedy decoding of them does not repeat one token, and
their attention is peaked, so that wrong keys and values change what they say.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["DIVIDED", "FAMILIES", "FORMATS", "copy_tokenizer", "fill", "make", "make_quantised"]

TOKENIZER = Path(__file__).parents[1] / "src" / "diffkv" / "data" / "reference"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HIDDEN = 128
VOCABULARY = 512
LOGIT_STD = 4.0
QUERY_KEY_STD = 1.5
"""Of each element of queries and keys; scores of attention then have a standard deviation of 2.25."""


@dataclass(frozen=True)
class Family:
    """How a family differs from the others.

    Attributes:
        config: name of its configuration's class in transformers; the model's follows from it.
        num_kv_heads: of 4 query heads, unless `settings` say otherwise.
        head_dim: elements of a head's key.
        settings: other fields of the configuration.
        norm_offset: what the model adds to the weights of its norms.
    """

    config: str
    num_kv_heads: int
    head_dim: int
    settings: dict[str, Any] = field(default_factory=dict)
    norm_offset: float = 0


MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1}
GRANITE = {
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention"] * 2,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 2 * HIDDEN,
    "position_embedding_type": "rope",
    **MAMBA,
}

FAMILIES = {
    "llama2": Family("LlamaConfig", 4, 64),
    "llama3": Family("LlamaConfig", 2, 128, {"rope_theta": 500000.0}),
    "llama_head80": Family("LlamaConfig", 2, 80),
    "llama_head256": Family("LlamaConfig", 1, 256),
    "mistral": Family("MistralConfig", 2, 64, {"sliding_window": None}),
    "mistral_window": Family("MistralConfig", 2, 64, {"sliding_window": 128}),
    "mixtral": Family("MixtralConfig", 2, 64, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_5": Family(
        "Qwen2Config", 2, 64, {"tie_word_embeddings": True, "use_sliding_window": False}
    ),
    "qwen3": Family("Qwen3Config", 2, 96),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        2,
        64,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        2,
        64,
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "sliding_window": 64,
            "query_pre_attn_scalar": 64,
            "tie_word_embeddings": True,
        },
        norm_offset=1,
    ),
    "llama4": Family(
        "Llama4TextConfig",
        2,
        64,
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 2 * HIDDEN,
            "no_rope_layers": [1, 0] * 2,
            "attention_chunk_size": 128,
            "interleave_moe_layer_step": 0,
            "moe_layers": [],
            "num_local_experts": 2,
            "attn_temperature_tuning": False,
        },
    ),
    "granite_hybrid": Family(
        "GraniteMoeHybridConfig", 2, 32, {"attention_multiplier": 32**-0.5, **GRANITE}
    ),
    "granite_head64": Family(  # flash-attention on GPUs has no smaller heads
        "GraniteMoeHybridConfig",
        1,
        64,
        {"attention_multiplier": 64**-0.5, "num_attention_heads": 2, **GRANITE},
    ),
    "falcon_h1": Family("FalconH1Config", 2, 64, {"mamba_d_ssm": 2 * HIDDEN, **MAMBA}),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        2,
        64,
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
        norm_offset=1,
    ),
}
"""Every family that DiffKV promises, by the name that tests give it."""

DIVIDED = ("gemma3", "llama4", "granite_hybrid", "granite_head64", "falcon_h1", "qwen3_next")
"""Those in which other layers, or layers with full attention too, have a cache of another kind."""


def make(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint, of two layers unless its family says otherwise.

    Args:
        family: a key of FAMILIES.
        folder: where to; made if it does not exist.
        dtype: of the weights.

    Returns:
        `folder`.
    """
    shape = FAMILIES[family]
    config_class = getattr(transformers, shape.config)
    settings = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **shape.settings,
    }
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **settings,
    )
    name = shape.config.replace("TextConfig", "Config").replace("Config", "ForCausalLM")
    model = getattr(transformers, name)(config)
    fill(model, shape.norm_offset)
    model.to(dtype).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


def copy_tokenizer(folder: Path) -> None:
    """Put the tokenizer of the shipped model into a folder."""
    for file in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / file, folder)


def fill(model: Any, norm_offset: float = 0) -> None:
    """Give a model of transformers random weights, of a fixed seed.

    Args:
        model: which.
        norm_offset: what it adds to the weights of its norms.
    """
    generator = torch.Generator().manual_seed(20240)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            weights = _weights(name, parameter.shape, tied, generator)
            parameter.copy_(weights - norm_offset if "norm" in name else weights)


def _weights(name: str, shape: torch.Size, tied: bool, generator: torch.Generator) -> Tensor:
    """Random weights that keep the scale of what flows through them."""
    random = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return random / 2
    if "norm" in name:
        # Random signs: else a tied embedding makes every token the most likely one after itself.
        is_head = name.endswith(("q_norm.weight", "k_norm.weight"))
        return random.sign() * (QUERY_KEY_STD if is_head else 1.0)
    if "embed_tokens" in name and not tied:
        return random
    std = 1 / math.sqrt(shape[1:].numel())
    if "lm_head" in name or "embed_tokens" in name:
        std *= LOGIT_STD
    elif name.endswith(("q_proj.weight", "k_proj.weight")):
        std *= QUERY_KEY_STD
    return random * std


# Weight formats, as vLLM's loaders read them from a checkpoint.

GROUP = 32
"""Inputs that share a scale in the 4-bit formats."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs sits in each nibble of an AWQ word, lowest first."""


def _pack(codes: Tensor) -> Tensor:
    """Eight 4-bit codes to an int32, lowest first: [..., 8 n] to [..., n]."""
    nibbles = codes.to(torch.int64).view(*codes.shape[:-1], -1, 8) << torch.arange(0, 32, 4)
    words = nibbles.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _grouped(weight: Tensor) -> Tensor:
    """[outputs, inputs] to [inputs / GROUP, GROUP, outputs]."""
    return weight.float().t().reshape(-1, GROUP, weight.shape[0])


def _gptq(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric: a code is 8 + weight / scale. Eight inputs to a word."""
    outputs, inputs = weight.shape
    grouped = _grouped(weight)
    scales = (grouped.abs().amax(1, keepdim=True) / 7).to(torch.float16)
    codes = (grouped / scales.float()).round().clamp(-8, 7) + 8
    return {
        "qweight": _pack(codes.view(inputs, outputs).t()).t().contiguous(),
        # This format stores a zero point less one.
        "qzeros": _pack(torch.full((inputs // GROUP, outputs), 7)),
        "scales": scales[:, 0],
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }


def _awq(weight: Tensor) -> dict[str, Tensor]:
    """Asymmetric: a weight is (code - zero) * scale. Eight outputs to a word, in AWQ's order."""
    outputs = weight.shape[0]
    grouped = _grouped(weight)
    low = grouped.amin(1, keepdim=True).clamp(max=0)
    high = grouped.amax(1, keepdim=True).clamp(min=0)
    scales = ((high - low) / 15).to(torch.float16)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = ((grouped / scales.float()).round() + zeros).clamp(0, 15)

    def pack(numbers: Tensor) -> Tensor:
        return _pack(numbers.reshape(-1, outputs // 8, 8)[:, :, AWQ_ORDER].flatten(1))

    return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales[:, 0]}


def _fp8(weight: Tensor) -> dict[str, Tensor]:
    """A scale for each output channel."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = weight.float().abs().amax(1, keepdim=True) / largest
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _int8(weight: Tensor) -> dict[str, Tensor]:
    """A scale for each output channel."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return {"weight": (weight.float() / scale).round().to(torch.int8), "weight_scale": scale}


def _compressed_tensors(kind: str, file_format: str) -> dict[str, Any]:
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": file_format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Format:
    """A weight format.

    Attributes:
        quantise: [outputs, inputs] weight to the tensors that replace it, by the end of their names.
        config: `quantization_config` of a checkpoint.
    """

    quantise: Callable[[Tensor], dict[str, Tensor]]
    config: dict[str, Any]


FORMATS = {
    "gptq": Format(
        _gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "awq": Format(
        _awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    "fp8": Format(_fp8, _compressed_tensors("float", "float-quantized")),
    "int8": Format(_int8, _compressed_tensors("int", "int-quantized")),
}
"""Every weight format that DiffKV promises, by the name that tests give it."""


def make_quantised(
    family: str, format_name: str, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write a checkpoint whose projections are quantised.

    Args:
        family: a key of FAMILIES.
        format_name: a key of FORMATS.
        folder: where to; made if it does not exist.
        dtype: of what is not quantised.

    Returns:
        `folder`.
    """
    make(family, folder, dtype)
    weight_format = FORMATS[format_name]
    file = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and stem.endswith("_proj"):
            parts = weight_format.quantise(tensor)
            tensors |= {f"{stem}.{end}": part.contiguous() for end, part in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = weight_format.config
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def main() -> None:
    """Make one checkpoint by hand."""
    if len(sys.argv) != 3 or sys.argv[1].split(":")[0] not in FAMILIES:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(FAMILIES)}[:{'|'.join(FORMATS)}] FOLDER")
    family, _, format_name = sys.argv[1].partition(":")
    if format_name:
        make_quantised(family, format_name, Path(sys.argv[2]))
    else:
        make(family, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
