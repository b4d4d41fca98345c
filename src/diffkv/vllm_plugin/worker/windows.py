"""The attention backend of a DiffKV engine on a CPU: layers with windows or chunks have vLLM's own.

On a CPU vLLM has one backend for all layers, whatever they are. So a layer's window, and a group's spec,
tell whose implementation it gets. For layers that attend within chunks vLLM derives a backend from it,
with a builder of its own.
"""

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    KVCacheLayout,
    SlidingWindowSpec,
)

from diffkv.vllm_plugin.worker.backend import DiffKVBackend, DiffKVBuilder, DiffKVImpl

__all__ = ["CpuBackend"]

LOCAL = (SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""Specs of groups of layers that keep vLLM's cache."""


class LocalImpl(CPUAttentionBackendImpl):
    """vLLM's own, which stores keys and values as a part of `forward`, as DiffKV's layers do."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Store and attend one layer of a step."""
        if attn_metadata is not None and self.kv_sharing_target_layer_name is None:
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        args = (attn_metadata, output, *args)
        return super().forward(layer, query, key, value, kv_cache, *args, **kwargs)


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
        kind = DiffKVImpl if sliding_window is None else LocalImpl
        first = num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window
        return kind(*first, *args, **kwargs)


class _Builder(DiffKVBuilder):
    """Plans the steps of a group of layers, of either kind."""

    def __new__(cls, kv_cache_spec: AttentionSpec, *args: Any, **kwargs: Any) -> Any:
        return _builder_of(kv_cache_spec)(kv_cache_spec, *args, **kwargs)


def _builder_of(spec: AttentionSpec) -> Any:
    if isinstance(spec, ChunkedLocalAttentionSpec):
        chunks = create_chunked_local_attention_backend(
            CPUAttentionBackend, spec.attention_chunk_size
        )
        return chunks.get_builder_cls()
    return CPUAttentionMetadataBuilder if isinstance(spec, SlidingWindowSpec) else DiffKVBuilder


class CpuBackend(DiffKVBackend):
    """DiffKV's attention, or vLLM's own for layers with windows or chunks."""

    @classmethod
    def get_impl_cls(cls) -> Any:
        """The layer: vLLM's own of a backend that is derived for chunks."""
        return _Impl if cls.get_builder_cls() is _Builder else LocalImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """The planner."""
        return _Builder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """What vLLM's own kernels read; ours make a pool of whatever there is."""
        return CPUAttentionBackend.supported_kv_cache_layouts()

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any for DiffKV's layers."""
        if isinstance(kv_cache_spec, LOCAL):
            return CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)
        return DiffKVBackend.get_supported_kernel_block_sizes(kv_cache_spec)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Leave windows and chunks to vLLM, and replace the spec of other layers."""
        if isinstance(spec, LOCAL):
            return CPUAttentionBackend.customize_spec(spec)
        return super().customize_spec(spec)
