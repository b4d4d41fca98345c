"""A GGUF file of the Llama architecture becomes a folder that transformers and vLLM load.

transformers reads the configuration and the tokenizer out of the file itself. The weights are
dequantised here: transformers would want a further library for them, and keep them quantised.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkv.quant import ConfigError

__all__ = ["convert"]

ARCHITECTURE = "llama"

WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Tensors of the whole model: their names in GGUF and in transformers."""

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensors of a layer, likewise."""


def convert(file: Path, folder: Path) -> None:
    """Write a model's folder: configuration, bfloat16 weights, tokenizer with its chat template.

    Args:
        file: GGUF file of a Llama with any quantisation that the library `gguf` knows.
        folder: where to; it must not exist.

    Raises:
        ConfigError: another architecture, or a tensor that a Llama has not.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**source)
    if config.model_type != ARCHITECTURE:
        raise ConfigError(f"{file} holds a {config.model_type}: only {ARCHITECTURE} is converted")
    vars(config).pop("_model_name_or_path", None)  # the name that the file gives itself: no path
    config.dtype = torch.bfloat16
    reader = GGUFReader(file)
    weights = _weights(reader, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if (
        unexpected
        or set(missing) - {"lm_head.weight"}
        or (missing and not config.tie_word_embeddings)
    ):
        raise ConfigError(f"{file} is no whole model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**source)
    special = _special_tokens(reader)
    for name, number in special.items():  # releases of transformers read them in several ways
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
        setattr(config, f"{name}_id", number)
    model.generation_config = GenerationConfig(**{f"{name}_id": n for name, n in special.items()})
    model.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _special_tokens(reader: Any) -> dict[str, int]:
    """Token ids that open a text, end one, and fill up a batch."""
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    fields = {
        name: reader.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()
    }
    return {name: int(field.contents()) for name, field in fields.items() if field is not None}


def _weights(reader: Any, config: Any) -> dict[str, Tensor]:
    """All tensors in bfloat16, under the names of transformers."""
    from gguf.quants import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name, kind = _name(tensor.name)
        if kind in heads:
            values = _as_halves(values, heads[kind])
        weights[name] = values.to(torch.bfloat16)
    return weights


def _name(name: str) -> tuple[str, str]:
    """A tensor's name in transformers, and its kind within a layer ("" outside of one).

    Raises:
        ConfigError: a Llama has no such tensor.
    """
    if name in WHOLE:
        return WHOLE[name], ""
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in LAYER:
        raise ConfigError(f"tensor {name} belongs to no {ARCHITECTURE}")
    return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}", parts[2]


def _as_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder a projection's rows from GGUF's order to that of transformers.

    GGUF has the two rows that RoPE rotates together side by side, transformers in two halves of a head.

    Args:
        weight: [num_heads * head_dim, hidden].
        num_heads: number of heads in it.
    """
    pairs = weight.view(num_heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
