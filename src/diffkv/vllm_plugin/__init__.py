"""DiffKV as a plugin of unmodified vLLM: the only package that imports it.

`register` is vLLM's entry point (group `vllm.general_plugins`), called in every process. Nothing changes
for an engine that does not ask for DiffKV's connector.
"""

from typing import Any

from diffkv.quant import ConfigError
from diffkv.vllm_plugin.arguments import arguments_of
from diffkv.vllm_plugin.matrix import CONNECTOR
from diffkv.vllm_plugin.options import DEFAULT_QUANT, Options

__all__ = ["DEFAULT_QUANT", "Options", "engine_args", "register"]


def register() -> None:
    """Tell vLLM of the backend, the spec and the connector. May be called again.

    vLLM calls it wherever DiffKV is installed, so another version of vLLM is warned, not stopped.
    """
    from vllm.logger import init_logger

    from diffkv.vllm_plugin.support import check_version

    try:
        check_version()
    except ConfigError as error:
        init_logger("vllm.diffkv").warning("DiffKV cannot be turned on: %s", error)
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if CONNECTOR in KVConnectorFactory._registry:
        return
    from diffkv.vllm_plugin.scheduler.divided import register_specs

    KVConnectorFactory.register_connector(CONNECTOR, "diffkv.vllm_plugin.connector", CONNECTOR)
    register_backend(AttentionBackendEnum.CUSTOM, "diffkv.vllm_plugin.worker.windows.CudaBackend")
    if current_platform.is_cpu():
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "diffkv.vllm_plugin.worker.select.CpuBackend"
        )
    register_specs()


def engine_args(quant: str = DEFAULT_QUANT, **options: Any) -> dict[str, Any]:
    """Arguments that turn DiffKV on: `LLM(model, **engine_args("k8v8-k4v2", alpha_high=20))`.

    Args:
        quant: quantisation configuration.
        **options: other fields of `Options`.

    Raises:
        ConfigError: an option that does not exist, a bad value, or a vLLM that is not supported.
    """
    from diffkv.vllm_plugin.support import check_version

    check_version()
    register()
    return arguments_of(Options.parse({"quant": quant, **options}))
