"""Which attention backend a CPU engine gets: ours if it was asked for, vLLM's own otherwise.

On CPUs vLLM ignores the backend that is asked for and imports whatever class is registered for CPU_ATTN.
So a name of this module is registered, and what it stands for is decided at each import, by the
configuration that is being built. vLLM's cache of choices keeps engines with and without a connector
apart.
"""

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from diffkv.vllm_plugin.matrix import CONNECTOR
from diffkv.vllm_plugin.options import Options

__all__ = ["options_of"]


def options_of(vllm_config: Any) -> Options | None:
    """DiffKV's options in a vLLM configuration; None if it is not turned on."""
    transfer = None if vllm_config is None else vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        return None
    return Options.parse(transfer.kv_connector_extra_config)


def __getattr__(name: str) -> Any:
    if name != "CpuBackend":
        raise AttributeError(name)
    if options_of(get_current_vllm_config_or_none()) is None:
        return resolve_obj_by_qualname(AttentionBackendEnum.CPU_ATTN.value)
    from diffkv.vllm_plugin.backend import DiffKVBackend

    return DiffKVBackend
