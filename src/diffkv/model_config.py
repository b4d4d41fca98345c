"""Sizes of a model from its own files: `config.json` and the headers of its weights.

Read without any model library, so that a plan or a preset needs none. Values that a file does not state
are derived as the model's architecture does it; nothing is loaded.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffkv.quant import ConfigError
from diffkv.recurrent import ATTENTION, DTYPE_BYTES, NO_STATES, States, states_of

__all__ = ["ModelConfig", "stored_weight_bytes", "weight_formats"]

QKV_BIAS_MODELS = ("qwen2", "qwen2_moe")
"""Their attention has a bias on Q, K and V that config.json does not mention."""
QK_NORM_MODELS = ("qwen3", "qwen3_moe")
WINDOW, CHUNK = "sliding_attention", "chunked_attention"
"""Kinds of layers without full attention, as `layer_types` names them."""
LLAMA4_INTERVAL = 4
"""Of Llama 4's layers every fourth has full attention, where config.json says nothing of it."""
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
"""Names of the number of experts, in the order in which vLLM looks for them."""
MIXED_LAYERS = {"first_k_dense_replace": 0, "n_shared_experts": 0, "interleave_moe_layer_step": 1}
MIXED_LAYERS |= {"moe_num_shared_experts": 0, "moe_layer_start_index": 0}
"""What says that layers have MLPs of several sizes, where it is larger."""
GROUP_META_BYTES = 2.5
"""Bytes of scale (float16) and zero (4 bits) of a group of GPTQ or AWQ weights."""


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a decoder that its KV cache and its weights follow from.

    Attributes:
        name: what the user called the model.
        architecture: first of `architectures`.
        model_type: `model_type` of config.json.
        num_layers: attention layers.
        num_windows: those of them with a sliding window or a chunk, which keep vLLM's own cache.
        window: tokens of the window, or of the chunk; 0 if no layer has one.
        states: recurrent states of layers, which keep vLLM's own cache, too.
        other_kinds: names of kinds of layers that have none of all these.
        num_q_heads: query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_dim: elements of a key or value vector.
        hidden_size: elements of a hidden state.
        intermediate_size: inner width of a dense layer's MLP, or of one expert.
        num_experts: 0 for a dense model.
        num_active_experts: experts of a token; 0 for a dense model.
        vocab_size: tokens of the vocabulary.
        tied: whether the output layer shares the embedding's weights.
        dtype: bfloat16, float16 or float32.
        weight_bits: bits of a quantised weight, or of the dtype.
        group_size: weights of a scale, where they are quantised in groups; else 0.
        attention_bias: whether Q, K and V (and O, where `output_bias`) have one.
        output_bias: whether O has one.
        qk_norm: whether Q and K are normalised for each head.
        max_model_len: longest context of the model.
        unsized: what keeps the size of its weights from being estimated; "" where it can be.
    """

    name: str
    architecture: str
    model_type: str
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_active_experts: int
    vocab_size: int
    tied: bool
    dtype: str
    weight_bits: int
    group_size: int
    attention_bias: bool
    output_bias: bool
    qk_norm: bool
    max_model_len: int
    num_windows: int = 0
    window: int = 0
    states: States = NO_STATES
    other_kinds: tuple[str, ...] = ()
    unsized: str = ""

    @classmethod
    def parse(cls, config: Mapping[str, Any], name: str) -> "ModelConfig":
        """Read the content of a config.json; a multimodal one's `text_config` where it has one.

        Raises:
            ConfigError: not a decoder with a plain KV cache, or a size is missing.
        """
        text: Mapping[str, Any] = {**config, **(config.get("text_config") or {})}
        if text.get("kv_lora_rank"):
            raise ConfigError(
                f"{name} has MLA: its cache is compressed already, DiffKV has no part"
            )
        try:
            num_q_heads = int(text["num_attention_heads"])
            hidden_size = int(text["hidden_size"])
            num_layers = int(text["num_hidden_layers"])
            vocab_size = int(text["vocab_size"])
            num_experts = _num_experts(text)
            intermediate = text.get("moe_intermediate_size") if num_experts else None
            intermediate_size = int(intermediate or text.get("intermediate_size") or 0)
        except KeyError as error:
            raise ConfigError(f"config.json of {name} has no {error}: not a decoder?") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.json of {name} has a bad size: {error}") from None
        model_type, dtype = str(text.get("model_type", "")), _dtype(text, name)
        quantization = config.get("quantization_config") or text.get("quantization_config") or {}
        formats = weight_formats(quantization)
        bits, group = max(formats, default=(DTYPE_BYTES[dtype] * 8, 0), key=lambda each: each[0])
        bias = bool(text.get("attention_bias", False))
        num_windows, window = _windows(text, num_layers)
        states = _states(text, num_layers, DTYPE_BYTES[dtype], name)
        return cls(
            name=name,
            architecture=str((config.get("architectures") or [""])[0]),
            model_type=model_type,
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=int(text.get("num_key_value_heads") or num_q_heads),
            head_dim=int(text.get("head_dim") or hidden_size // num_q_heads),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            num_active_experts=int(text.get("num_experts_per_tok") or 0) if num_experts else 0,
            vocab_size=vocab_size,
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            dtype=dtype,
            weight_bits=bits,
            group_size=group,
            attention_bias=bias or model_type in QKV_BIAS_MODELS,
            output_bias=bias and model_type not in QKV_BIAS_MODELS,
            qk_norm=model_type in QK_NORM_MODELS,
            max_model_len=int(text.get("max_position_embeddings") or 0),
            num_windows=num_windows,
            window=window,
            states=states or NO_STATES,
            other_kinds=_other_kinds(text, states),
            unsized=_unsized(text, states or NO_STATES, {} if formats else quantization),
        )

    @classmethod
    def read(cls, path: Path, name: str) -> "ModelConfig":
        """Read a config.json.

        Raises:
            ConfigError: it cannot be read, is no JSON object, or see `parse`.
        """
        try:
            config = json.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path} holds no JSON object")
        return cls.parse(config, name)

    @property
    def num_full(self) -> int:
        """Layers with full attention, which have DiffKV's cache."""
        return (
            self.num_layers - self.num_windows - self.states.num_layers * (not self.states.attend)
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the model's dtype."""
        return DTYPE_BYTES[self.dtype]

    @property
    def _attention_parameters(self) -> int:
        q, kv = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        biases = (q + 2 * kv) * self.attention_bias + self.hidden_size * self.output_bias
        return 2 * self.hidden_size * (q + kv) + biases + 2 * self.head_dim * self.qk_norm

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert's, or a dense layer's, gated MLP."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        """Weights, by the architecture's formula: embeddings, attention, MLPs, routers, norms."""
        mlps = self.expert_parameters * max(1, self.num_experts)
        layer = self._attention_parameters + mlps + self.hidden_size * (self.num_experts + 2)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.num_layers * layer + self.hidden_size

    @property
    def estimated_weight_bytes(self) -> int:
        """Bytes of the weights: linear layers in `weight_bits` and scales, the rest in the dtype.

        Nothing that is right where the model is `unsized`.
        """
        q, kv = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlps = self.expert_parameters * max(1, self.num_experts)
        linear = self.num_layers * (2 * self.hidden_size * (q + kv) + mlps)
        meta = linear / self.group_size * GROUP_META_BYTES if self.group_size else 0
        rest = (self.num_parameters - linear) * self.element_bytes
        return int(linear * self.weight_bits / 8 + meta + rest)


def _states(
    text: Mapping[str, Any], num_layers: int, element_bytes: int, name: str
) -> States | None:
    """Recurrent states; None where they are of a kind that is not known here."""
    try:
        return states_of(text, num_layers, element_bytes)
    except KeyError as error:
        raise ConfigError(f"config.json of {name} has no {error}, a state's size") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.json of {name} has a bad size of a state: {error}") from None


def _other_kinds(text: Mapping[str, Any], states: States | None) -> tuple[str, ...]:
    """Kinds of layers of which nothing is known here."""
    if states is None:
        return ("recurrent states of a kind of its own",)
    kinds = {*(text.get("layers_block_type") or ()), *(text.get("layer_types") or ())}
    known = {*ATTENTION, WINDOW, CHUNK}
    return () if states.num_layers else tuple(sorted(kinds - known))


def _windows(text: Mapping[str, Any], num_layers: int) -> tuple[int, int]:
    """(layers with a sliding window or a chunk, tokens of it)."""
    chunk, kinds = int(text.get("attention_chunk_size") or 0), list(text.get("layer_types") or ())
    if chunk:
        interval = int(text.get("no_rope_layer_interval") or LLAMA4_INTERVAL)
        rotated = list(text.get("no_rope_layers") or ())  # 1 for layers with rotation and chunks
        num_full = rotated.count(0) if rotated else num_layers // interval
        return (kinds.count(CHUNK) if kinds else num_layers - num_full), chunk
    window = int(text.get("sliding_window") or 0)
    if not window or not text.get("use_sliding_window", True):
        return 0, 0
    pattern = int(text.get("sliding_window_pattern") or 0)
    if kinds:
        num_windows = kinds.count(WINDOW)
    else:
        num_windows = num_layers - (num_layers // pattern if pattern else 0)
    return num_windows, window if num_windows else 0


def _num_experts(text: Mapping[str, Any]) -> int:
    """Experts of a layer, by the names that vLLM knows."""
    found = next((text[name] for name in EXPERTS if text.get(name)), 0)
    return int(found[0] if isinstance(found, list) else found)


def _dtype(text: Mapping[str, Any], name: str) -> str:
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"config.json of {name} has dtype {dtype}: not {', '.join(DTYPE_BYTES)}")
    return dtype


def _unsized(text: Mapping[str, Any], states: States, unknown: Mapping[str, Any]) -> str:
    """See `ModelConfig.unsized`; with a quantization_config of which nothing is known."""
    if states.num_layers:
        return "recurrent states"
    if unknown:
        method = str(unknown.get("quant_method", ""))
        return f"weights quantised by {method or 'an unnamed method'}"
    if any(int(text.get(name) or 0) > most for name, most in MIXED_LAYERS.items()):
        return "layers with experts and others, or experts for all tokens"
    if not (text.get("intermediate_size") or text.get("moe_intermediate_size")):
        return "no intermediate_size"
    return ""


def weight_formats(quantization: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(bits of a weight, weights of a group) of each kind of weights; empty where they are not known.

    Args:
        quantization: `quantization_config` of a config.json.
    """
    method = str(quantization.get("quant_method", ""))
    if method in ("gptq", "awq", "gptq_marlin", "awq_marlin"):
        return [
            (int(quantization.get("bits", 4)), max(0, int(quantization.get("group_size", 128))))
        ]
    if method in ("fp8", "fbgemm_fp8"):
        return [(8, 0)]
    if method == "compressed-tensors":
        groups = quantization.get("config_groups") or {}
        weights = [group.get("weights") or {} for group in groups.values()]
        if all("num_bits" in each for each in weights):
            return [(int(w["num_bits"]), max(0, int(w.get("group_size") or 0))) for w in weights]
    return []


def stored_weight_bytes(folder: Path) -> int | None:
    """Bytes of the tensors in a model folder, or None if it holds no weights.

    From the total of `model.safetensors.index.json` where there is one, else from the headers of the
    safetensors files, else the size of `*.bin` files.

    Raises:
        ConfigError: a file is damaged.
    """
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            total = json.loads(index.read_text()).get("metadata", {}).get("total_size")
            if total is not None:
                return int(total)
        files = sorted(folder.glob("*.safetensors"))
        if files:
            return sum(map(_tensor_bytes, files))
        sizes = [path.stat().st_size for path in folder.glob("*.bin")]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise ConfigError(f"cannot read the weights' headers in {folder}: {error!r}") from None
    return sum(sizes) if sizes else None


def _tensor_bytes(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} has no header")
        header = json.loads(file.read(length))
    ends = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
    return int(sum(end - begin for begin, end in ends))
