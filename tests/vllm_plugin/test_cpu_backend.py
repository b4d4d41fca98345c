"""The class that vLLM's CPU platform finds under CPU_ATTN, and what it asks of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from conftest import KV_BYTES, MODEL
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig
from diffkv.vllm_plugin import engine_args
from diffkv.vllm_plugin.spec import DiffKVSpec
from diffkv.vllm_plugin.worker.cpu import CpuBackend

BLOCK_TOKENS = 128


@contextmanager
def building(**args: Any) -> Iterator[None]:
    """As while vLLM builds an engine with these arguments."""
    if "kv_transfer_config" in args:
        args["kv_transfer_config"] = KVTransferConfig(**args["kv_transfer_config"])
    config = EngineArgs(
        model=MODEL, max_model_len=2048, kv_cache_memory_bytes=KV_BYTES, **args
    ).create_engine_config()
    with set_current_vllm_config(config):
        yield


def test_the_engine_that_is_built_decides() -> None:
    """The platform asks the class whether it has a cache's dtype, and which block size it likes."""
    for args, expected in (
        ({}, CPUAttentionBackend),
        (engine_args("k8v4-k4v2"), CpuBackend),
        ({"enable_prefix_caching": False}, CPUAttentionBackend),
    ):
        with building(**args):
            backend = AttentionBackendEnum.CPU_ATTN.get_class()
        assert backend is expected
        assert backend.supports_kv_cache_dtype("auto")
        assert backend.get_preferred_block_size(BLOCK_TOKENS) == BLOCK_TOKENS


def test_spec_has_no_mode_of_vllms_formats() -> None:
    """Also where vLLM counts the mode for plugins as one of Octave's."""
    base = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    layout = PageLayout.derive(QuantConfig.parse("k8v4-k4v2"), 64, element_bytes=4)
    spec = DiffKVSpec.of(base, layout, 2, 2048, 8)
    assert spec.kv_quant_mode is KVQuantMode.NONE
