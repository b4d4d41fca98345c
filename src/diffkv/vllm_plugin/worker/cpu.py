"""The attention backend of a DiffKV engine on a CPU.

There vLLM has one backend for all layers, whatever they are. So a layer's window, and a group's spec,
tell whose implementation it gets.
"""

from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from diffkv.vllm_plugin.worker.backend import DiffKVImpl
from diffkv.vllm_plugin.worker.windows import MixedBackend, local_impl

__all__ = ["CpuBackend"]


class _Impl(DiffKVImpl):
    """One attention layer, of either kind."""

    def __new__(
        cls,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        kind = DiffKVImpl if sliding_window is None else local_impl(CpuBackend.own)
        first = num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window
        return kind(*first, *args, **kwargs)


class CpuBackend(MixedBackend):
    """For every layer."""

    own = CPUAttentionBackend

    @classmethod
    def get_impl_cls(cls) -> Any:
        """The layer: vLLM's own of a backend that is derived for chunks."""
        return local_impl(cls.own) if cls.is_derived() else _Impl

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """What vLLM's own kernels read; ours make a pool of whatever there is."""
        return cls.own.supported_kv_cache_layouts()
