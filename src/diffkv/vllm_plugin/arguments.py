"""The engine arguments that turn DiffKV on."""

from typing import Any

from diffkv.vllm_plugin.matrix import CONNECTOR
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.requests import admission_path

__all__ = ["arguments_of"]

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
        args["attention_backend"] = "CUSTOM"
    return args
