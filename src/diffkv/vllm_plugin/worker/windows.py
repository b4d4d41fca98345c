"""The attention backend of a DiffKV engine, where some layers keep vLLM's own for windows or chunks.

On a GPU vLLM asks DiffKV for layers with full attention, and chooses a backend for windows itself. But
layers that attend within chunks count as full attention: from their backend it derives another, with a
builder of its own. On a CPU all layers have one backend (`cpu`).
"""

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    KVCacheLayout,
    SlidingWindowSpec,
)

from diffkv.vllm_plugin.spec import DiffKVSpec
from diffkv.vllm_plugin.worker.backend import DiffKVBackend, DiffKVBuilder, DiffKVImpl

__all__ = ["CudaBackend", "MixedBackend", "local_impl"]

LOCAL = (SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""Specs of groups of layers that keep vLLM's cache."""


class _Stores:
    """Has an implementation of vLLM's store keys and values as a part of `forward`, as DiffKV's do."""

    own: ClassVar[Any]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Store and attend one layer of a step."""
        impl: Any = super()
        if attn_metadata is not None and self.kv_sharing_target_layer_name is None:  # type: ignore[attr-defined]
            impl.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        args = (attn_metadata, output, *args)
        attended: Tensor = impl.forward(layer, query, key, value, kv_cache, *args, **kwargs)
        return attended


@cache
def local_impl(own: Any) -> Any:
    """The implementation of layers with windows or chunks.

    Args:
        own: vLLM's backend for them.
    """
    impl = own.get_impl_cls()
    assert not own.forward_includes_kv_cache_update, f"{own.get_name()} stores by itself"
    return type(f"Local{impl.__name__}", (_Stores, impl), {"own": own})


class _Builder(DiffKVBuilder):
    """Plans the steps of a group of layers, of either kind."""

    def __new__(
        cls,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        builder: Any = DiffKVBuilder
        if not isinstance(kv_cache_spec, DiffKVSpec):
            layers = vllm_config.compilation_config.static_forward_context
            own = layers[layer_names[0]].impl.own
            if isinstance(kv_cache_spec, ChunkedLocalAttentionSpec):
                chunk = kv_cache_spec.attention_chunk_size
                own = create_chunked_local_attention_backend(own, chunk)
            builder = own.get_builder_cls()
        return builder(kv_cache_spec, layer_names, vllm_config, *args, **kwargs)


class MixedBackend(DiffKVBackend):
    """DiffKV's attention, or vLLM's own for layers with windows or chunks.

    Attributes:
        own: vLLM's backend for those.
    """

    own: ClassVar[Any]

    @classmethod
    def is_derived(cls) -> bool:
        """Whether this is what vLLM has derived for layers with chunks, and nothing else."""
        return cls.get_builder_cls() is not _Builder

    @classmethod
    def is_own(cls, spec: Any) -> bool:
        """Whether layers of a spec, or without one those of this class, keep vLLM's backend."""
        return cls.is_derived() or isinstance(spec, LOCAL)

    @staticmethod
    def get_builder_cls() -> Any:
        """The planner."""
        return _Builder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any for DiffKV's layers."""
        whose: Any = cls.own if cls.is_own(kv_cache_spec) else DiffKVBackend
        sizes: list[int | MultipleOf] = whose.get_supported_kernel_block_sizes(kv_cache_spec)
        return sizes

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Leave windows and chunks to vLLM, and replace the spec of other layers."""
        if isinstance(spec, LOCAL):
            return cls.own.customize_spec(spec)
        return super().customize_spec(spec)


class CudaBackend(MixedBackend):
    """For layers with full attention, and with chunks."""

    @classmethod
    def get_impl_cls(cls) -> Any:
        """The layer. Of chunks it is what a window would have in the engine that is being built."""
        if not cls.is_derived():
            return DiffKVImpl
        config = get_current_vllm_config()
        head_size, dtype = config.model_config.get_head_size(), torch.get_default_dtype()
        cls.own = get_attn_backend(
            head_size, dtype, config.cache_config.cache_dtype, has_sliding_window=True
        )
        return local_impl(cls.own)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        """What vLLM's own kernels read; ours make a pool of whatever there is."""
        return cls.own.supported_kv_cache_layouts() if cls.is_derived() else None
