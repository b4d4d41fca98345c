"""The KV memory of a model in which only some layers have full attention, divided when an engine starts.

Those layers get DiffKV's pool, all others keep vLLM's blocks. In vLLM all layers share the blocks of one
allocation, whatever their kind. So vLLM is left as many blocks as the other layers need, and the bytes
of the rest are the pool, with blocks of account of its own.
"""

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import MambaSpec

from diffkv.quant import ConfigError
from diffkv.shape import PoolShape
from diffkv.vllm_plugin.matrix import WITHOUT
from diffkv.vllm_plugin.spec import DiffKVSpec, DividedSpec

__all__ = ["Division", "divide", "group_of"]

TYPICAL_SHARE = 0.25
"""Length of the requests for which pool and blocks run out together, as a share of the longest one's."""


@dataclass(frozen=True)
class Division:
    """How the KV memory is divided.

    Attributes:
        num_blocks: blocks that vLLM keeps for the other layers, with the one that is nobody's.
        block_bytes: bytes of one, for all layers of a group.
        pool_bytes: bytes of DiffKV's pool.
        num_layers: layers that have the pool.
        num_others: layers that have blocks.
    """

    num_blocks: int
    block_bytes: int
    pool_bytes: int
    num_layers: int
    num_others: int

    @property
    def blocks_bytes(self) -> int:
        """Bytes of the blocks that vLLM keeps."""
        return self.num_blocks * self.block_bytes


def group_of(kv_cache_config: Any) -> Any:
    """The group of layers that have DiffKV's cache.

    Raises:
        ConfigError: there is none, or several.
    """
    groups = [
        group
        for group in kv_cache_config.kv_cache_groups
        if isinstance(group.kv_cache_spec, DiffKVSpec)
    ]
    if not groups:
        raise ConfigError(
            "DiffKV's connector runs without its attention backend: pass --attention-backend CUSTOM"
        )
    if len(groups) > 1:
        raise ConfigError(
            f"DiffKV needs layers with full attention that are alike, and hardly more of them than "
            f"of any other kind: {WITHOUT}"
        )
    return groups[0]


def divide(kv_cache_config: Any, vllm_config: Any) -> Division | None:
    """Divide the KV memory, and leave vLLM its part only, before it allocates any.

    Args:
        kv_cache_config: vLLM's KVCacheConfig, of which blocks and tensors are changed.
        vllm_config: vLLM's configuration.

    Returns:
        None if all layers have DiffKV's cache.

    Raises:
        ConfigError: see `group_of`.
    """
    spec = group_of(kv_cache_config).kv_cache_spec
    if not isinstance(spec, DividedSpec):
        return None
    groups = kv_cache_config.kv_cache_groups
    size, total = kv_cache_config.kv_cache_tensors[0].size, kv_cache_config.num_blocks
    block_bytes = size // total
    num_blocks = _blocks_of_others(groups, spec, vllm_config, total, block_bytes)
    cache_config = vllm_config.cache_config
    before = cache_config.num_gpu_blocks_override
    cache_config.num_gpu_blocks_override = num_blocks
    try:
        left = get_kv_cache_config_from_groups(vllm_config, groups, num_blocks * block_bytes)
    finally:
        cache_config.num_gpu_blocks_override = before
    kv_cache_config.num_blocks = left.num_blocks
    kv_cache_config.kv_cache_tensors = left.kv_cache_tensors
    return Division(
        num_blocks,
        block_bytes,
        size - num_blocks * block_bytes,
        spec.num_layers,
        sum(len(group.layer_names) for group in groups) - spec.num_layers,
    )


def _blocks_of_others(
    groups: list[Any], spec: DividedSpec, vllm_config: Any, total: int, block_bytes: int
) -> int:
    """Blocks for the layers that keep vLLM's cache, its first included, which is nobody's.

    Enough for the most requests of the typical length for which the pool would be too, and never too
    few or too many for one request of the longest length, which vLLM has made sure of.
    """
    others = [group.kv_cache_spec for group in groups if group.kv_cache_spec is not spec]
    longest = vllm_config.model_config.max_model_len
    tokens_of_steps = vllm_config.max_in_flight_tokens
    typical = max(1, int(TYPICAL_SHARE * longest))
    request = PoolShape.request_bytes(
        spec.layout, spec.num_layers, spec.num_kv_heads, typical, spec.segment
    )
    least_bytes = spec.least_pool_bytes(longest)
    most = total - -(-least_bytes // block_bytes)
    least = 1 + sum(
        -(-each.max_memory_usage_bytes(vllm_config) // each.page_size_bytes) for each in others
    )

    def blocks(num_requests: int) -> int:
        return 1 + sum(
            _blocks_of_requests(each, num_requests, typical, tokens_of_steps, vllm_config)
            for each in others
        )

    fitting = least
    for num_requests in range(1, vllm_config.scheduler_config.max_num_seqs + 1):
        wanted = blocks(num_requests)
        if wanted * block_bytes + num_requests * request > total * block_bytes:
            break
        fitting = wanted
    assert least <= most, f"vLLM starts with {total} blocks, where {least} and {total - most} are needed"
    return max(least, min(fitting, most))


def _blocks_of_requests(
    spec: Any, num_requests: int, num_tokens: int, tokens_of_steps: int, vllm_config: Any
) -> int:
    """Blocks that a group of layers takes for some requests of so many tokens.

    Windows hold the latest tokens, and all tokens of the steps that run; recurrent layers a state for
    each request.
    """
    if isinstance(spec, MambaSpec):
        return num_requests * -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
    held = min(num_tokens, spec.sliding_window)
    in_flight = min(tokens_of_steps, num_requests * num_tokens)
    return num_requests * (1 + -(-held // spec.block_size)) + -(-in_flight // spec.block_size)
