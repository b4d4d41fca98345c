"""What attention the layers of a model have, by its configuration.

Only those with full attention can have DiffKV's cache. Nothing here imports vLLM.
"""

from typing import Any

from diffkv.recurrent import ATTENTION

__all__ = [
    "has_alibi",
    "has_linear_attention",
    "has_mamba1",
    "has_states_only",
    "has_windows_only",
    "is_divided",
    "is_divided_under_one_manager",
    "num_full_layers",
]


ATTENDS = (*ATTENTION, "hybrid")
"""Names of layers with full attention; "hybrid" ones have a state too."""


def num_full_layers(vllm_config: Any) -> int:
    """Layers with full attention: 0 for a model of windows, of chunks or of recurrent states alone."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model.is_attention_free:
        return 0
    text = model.hf_text_config
    kinds = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None) or ()
    if _is_local(model) or (model.is_hybrid and kinds):
        return sum(kind in ATTENDS for kind in kinds)
    return int(model.get_num_layers(parallel))


def has_windows_only(vllm_config: Any) -> bool:
    """Whether there are windows or chunks, and no layer has full attention."""
    return _is_local(vllm_config.model_config) and num_full_layers(vllm_config) == 0


def has_states_only(vllm_config: Any) -> bool:
    """Whether there are recurrent states, and no layer has full attention."""
    model = vllm_config.model_config
    has_states = model.is_hybrid or model.is_attention_free
    return has_states and num_full_layers(vllm_config) == 0


def has_mamba1(vllm_config: Any) -> bool:
    """Whether states are those of Mamba's first version, as in Jamba."""
    return hasattr(vllm_config.model_config.hf_text_config, "mamba_dt_rank")


def has_linear_attention(vllm_config: Any) -> bool:
    """Whether states are those of gated linear attention, as in Qwen3-Next."""
    return hasattr(vllm_config.model_config.hf_text_config, "linear_key_head_dim")


def is_divided(vllm_config: Any) -> bool:
    """Whether some layers have full attention, and some, or those too, windows, chunks or states."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_full = num_full_layers(vllm_config)
    return num_full > 0 and (model.is_hybrid or num_full < int(model.get_num_layers(parallel)))


def is_divided_under_one_manager(vllm_config: Any) -> bool:
    """Whether layers of several kinds are to have one kind of cache."""
    one = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    return bool(one) and is_divided(vllm_config)


def has_alibi(vllm_config: Any) -> bool:
    """Whether positions are biases of attention."""
    text = vllm_config.model_config.hf_text_config
    return getattr(text, "model_type", None) == "bloom" or bool(getattr(text, "alibi", None))


def _is_local(model: Any) -> bool:
    """Whether there are layers that see a window, or a chunk."""
    return _has_windows(model) or _has_chunks(model)


def _has_windows(model: Any) -> bool:
    text = model.hf_text_config
    return (
        getattr(text, "sliding_window", None) is not None
        and not model.disable_sliding_window
        and bool(getattr(text, "use_sliding_window", True))
    )


def _has_chunks(model: Any) -> bool:
    return bool(getattr(model.hf_text_config, "attention_chunk_size", None))
