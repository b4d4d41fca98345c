"""The attention backend: hands each layer of a step to the cache."""

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from diffkv.cache import Step
from diffkv.quant import ConfigError
from diffkv.vllm_plugin.matrix_row import WITHOUT
from diffkv.vllm_plugin.options import options_of
from diffkv.vllm_plugin.spec import DiffKVSpec, DividedSpec
from diffkv.vllm_plugin.support import check_config, check_layer
from diffkv.vllm_plugin.worker.cache import BatchRows, WorkerCache

__all__ = ["DiffKVBackend", "DiffKVBuilder", "DiffKVImpl", "DiffKVMetadata"]


@dataclass
class DiffKVMetadata:
    """A step, for each of its layers. The first one plans it.

    By then the worker has the scheduler's message: vLLM's first model runner gives it before it builds
    metadata, its second one after that, and dummy runs have none. In a whole CUDA graph the plan is a
    part of the graph, made from buffers of vLLM's that stay, so a replay asks nothing of Python.

    Attributes:
        worker: the pool, and its requests.
        common: vLLM's own metadata.
        layers: index of each layer in the pool, by name.
        step: the step as planned; None before its first layer.
        num_left: layers that have yet to attend.
    """

    worker: WorkerCache
    common: Any
    layers: dict[str, int]
    step: Step | None = None
    num_left: int = 0

    def plan(self) -> Step:
        """Plan the step, or plan it anew."""
        m = self.common
        rows = BatchRows(
            m.block_table_tensor[: m.num_reqs, 0],
            m.query_start_loc_cpu[: m.num_reqs + 1].numpy(),
            m.seq_lens[: m.num_reqs],
        )
        self.step, self.num_left = self.worker.plan(rows), len(self.layers)
        return self.step

    def of_next_layer(self) -> Step:
        """The plan, for one layer after the other."""
        step = self.step if self.step is not None and self.num_left else self.plan()
        self.num_left -= 1
        return step


class DiffKVBuilder(AttentionMetadataBuilder[DiffKVMetadata]):
    """Makes the metadata of each step."""

    reorder_batch_threshold: int | None = 1

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._layers = {name: index for index, name in enumerate(layer_names)}
        self._impl = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: Any, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """Steps of generated tokens alone: their launches are static, over buffers that stay.

        The first model runner also replays such a graph where prompts have one token left.
        """
        if vllm_config.device_config.device_type == "cuda" and vllm_config.use_v2_model_runner:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> DiffKVMetadata | None:
        """Take the step that vLLM describes; None before there is a pool, when vLLM measures graphs."""
        if self._impl.worker is None:
            return None
        return DiffKVMetadata(self._impl.worker, common_attn_metadata, self._layers)


class DiffKVImpl(AttentionImpl[DiffKVMetadata]):
    """One attention layer.

    Attributes:
        worker: the pool, set when vLLM has allocated the KV cache.
    """

    worker: WorkerCache | None = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        check_layer(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            kv_sharing=kv_sharing_target_layer_name,
            sinks=sinks is not None,
            **others,
        )
        if attn_type != AttentionType.DECODER:
            raise ConfigError(f"DiffKV does not support {attn_type} attention layers")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        _note_spec(get_current_vllm_config(), head_size)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: DiffKVMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store and attend one layer of a step; warm-up runs without one give zeros.

        So do tokens that no request has in dummy runs: what becomes of them may stay in other caches.
        """
        if attn_metadata is None:
            return output.fill_(0)
        m = attn_metadata
        step, index = m.of_next_layer(), m.layers[layer.layer_name]
        num_requests = m.common.num_reqs
        if step.prompts is None and num_requests < len(query):
            output[num_requests:].fill_(0)
        m.worker.cache.attend(index, step, query, key, value, output.view(query.shape))
        return output


_config_of: dict[int, weakref.ref[Any]] = {}
"""The configuration of the engine whose layers were built last, by head_dim: `customize_spec` is called
without a current one, when all layers are there."""


def _note_spec(vllm_config: Any, head_dim: int) -> None:
    options = options_of(vllm_config)
    if options is None:
        raise ConfigError(
            "the attention backend CUSTOM is DiffKV's, but --kv-transfer-config does not name its "
            "connector: use diffkv serve, or the flags that it prints"
        )
    check_config(vllm_config, options)
    _config_of[head_dim] = weakref.ref(vllm_config)


def _spec_of(spec: AttentionSpec) -> DiffKVSpec:
    """The spec of a layer for which vLLM would have used `spec`."""
    vllm_config = _config_of[spec.head_size]()
    assert vllm_config is not None, "the engine of these layers is gone"
    options, model = options_of(vllm_config), vllm_config.model_config
    assert options is not None, "an engine without DiffKV"
    layers = [
        layer
        for layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase).values()
        if getattr(layer, "attn_type", AttentionType.DECODER) == AttentionType.DECODER
    ]
    num_layers = sum(isinstance(getattr(layer, "impl", None), DiffKVImpl) for layer in layers)
    kind = DiffKVSpec if num_layers == len(layers) else DividedSpec
    return kind.of(
        spec,
        options.layout(spec.head_size, model.dtype.itemsize),
        num_layers,
        model.max_model_len,
        vllm_config.scheduler_config.max_num_seqs,
        options.segment,
    )


class DiffKVBackend(AttentionBackend):
    """Attention over a DiffKV pool."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """Name among vLLM's backends: the slot for one from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[DiffKVImpl]:
        """The layer."""
        return DiffKVImpl

    @staticmethod
    def get_builder_cls() -> type[DiffKVBuilder]:
        """The planner."""
        return DiffKVBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Blocks are units of account, so any size will do."""
        return [MultipleOf(1)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windowed layers would need another rule for what to keep."""
        return False

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Why a layer cannot have it; vLLM starts no engine then."""
        reasons = super().validate_configuration(*args, **kwargs)
        if kwargs.get("has_sliding_window"):
            reasons.append(
                "DiffKV is for layers with full attention: in place of --attention-backend CUSTOM pass "
                "--attention-config.backend_per_kind.full_attention CUSTOM"
            )
        return reasons

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Replace the spec vLLM made for a layer by ours."""
        if isinstance(spec, DiffKVSpec):
            return spec
        if type(spec) is not FullAttentionSpec or spec.non_causal:
            raise ConfigError(
                f"DiffKV does not support attention layers with a cache of another kind "
                f"({type(spec).__name__}): {WITHOUT}"
            )
        return _spec_of(spec)
