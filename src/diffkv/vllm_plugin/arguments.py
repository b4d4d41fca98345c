"""The engine arguments that turn DiffKV on."""

from copy import deepcopy
from typing import Any

from diffkv.quant import ConfigError
from diffkv.vllm_plugin.matrix import CONNECTOR
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.requests import admission_path

__all__ = ["BACKENDS", "arguments_of", "with_backends"]

BACKENDS = {"full_attention": "CUSTOM"}
"""By vLLM's kinds of layers, on a GPU: for those of other kinds it chooses one as without DiffKV."""

WATERMARK = 0.04
"""Share of the blocks that vLLM leaves free when it admits requests: several times more of them run at
once than with its own cache, and all of them grow."""


def arguments_of(options: Options) -> dict[str, Any]:
    """Those of an engine with these options, by their names in vLLM's `EngineArgs`."""
    from vllm.platforms import current_platform

    args = {
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": options.to_dict(),
        },
        "worker_extension_cls": "diffkv.vllm_plugin.worker.extension.WorkerExtension",
        "logits_processors": [admission_path(options)],
        "watermark": WATERMARK,
    }
    if not current_platform.is_cpu():
        args["attention_config"] = {"backend_per_kind": dict(BACKENDS)}
    return args


def with_backends(given: Any) -> Any:
    """A user's settings of attention, with DiffKV's backend in them.

    Args:
        given: vLLM's AttentionConfig, or its fields.

    Raises:
        ConfigError: another backend is asked for.
    """
    from vllm.config import AttentionConfig

    config = AttentionConfig(**given) if isinstance(given, dict) else deepcopy(given)
    if config.backend is not None or BACKENDS.keys() & config.backend_per_kind.keys():
        raise ConfigError(
            "--attention-config: DiffKV is the attention backend of layers with full attention: leave "
            "out backend, and let backend_per_kind name other kinds only"
        )
    ours = AttentionConfig(backend_per_kind=BACKENDS).backend_per_kind
    config.backend_per_kind = {**config.backend_per_kind, **ours}
    return config
