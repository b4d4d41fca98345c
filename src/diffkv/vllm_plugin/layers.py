"""What attention the layers of a model have, by its configuration.

Only those with full attention can have DiffKV's cache. Nothing here imports vLLM.
"""

from typing import Any

from diffkv.model_config import FULL

__all__ = [
    "has_alibi",
    "has_chunks",
    "has_windows_only",
    "is_divided",
    "is_divided_under_one_manager",
    "num_full_layers",
]


def num_full_layers(vllm_config: Any) -> int:
    """Layers with full attention: 0 for a model of windows alone."""
    model = vllm_config.model_config
    if not _has_windows(model):
        return int(model.get_num_layers(vllm_config.parallel_config))
    return list(getattr(model.hf_text_config, "layer_types", None) or ()).count(FULL)


def has_windows_only(vllm_config: Any) -> bool:
    """Whether no layer has full attention."""
    return num_full_layers(vllm_config) == 0


def is_divided(vllm_config: Any) -> bool:
    """Whether some layers have full attention and others have not."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return 0 < num_full_layers(vllm_config) < int(model.get_num_layers(parallel))


def is_divided_under_one_manager(vllm_config: Any) -> bool:
    """Whether layers of several kinds are to have one kind of cache."""
    one = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    return bool(one) and is_divided(vllm_config)


def has_chunks(vllm_config: Any) -> bool:
    """Whether layers attend within chunks."""
    text = vllm_config.model_config.hf_text_config
    return bool(getattr(text, "attention_chunk_size", None))


def has_alibi(vllm_config: Any) -> bool:
    """Whether positions are biases of attention."""
    text = vllm_config.model_config.hf_text_config
    return getattr(text, "model_type", None) == "bloom" or bool(getattr(text, "alibi", None))


def _has_windows(model: Any) -> bool:
    text = model.hf_text_config
    return (
        getattr(text, "sliding_window", None) is not None
        and not model.disable_sliding_window
        and bool(getattr(text, "use_sliding_window", True))
    )
