"""The attention backend of an engine on a CPU: DiffKV's if it was asked for, vLLM's own otherwise.

On CPUs vLLM ignores the backend it was asked for and imports the class registered for CPU_ATTN. So a
name in this module is registered, and resolved at each import by the configuration that is being built.
vLLM's cache of choices keeps engines with and without a connector apart.
"""

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from diffkv.vllm_plugin.options import options_of


def __getattr__(name: str) -> Any:
    if name != "CpuBackend":
        raise AttributeError(name)
    if options_of(get_current_vllm_config_or_none()) is None:
        return resolve_obj_by_qualname(AttentionBackendEnum.CPU_ATTN.value)
    from diffkv.vllm_plugin.worker.cpu import CpuBackend

    return CpuBackend
