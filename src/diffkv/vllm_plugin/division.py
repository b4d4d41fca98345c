"""The KV memory of a model in which only some layers have full attention, divided when an engine starts.

Those layers get DiffKV's pool, all others keep vLLM's blocks. In vLLM all layers share the blocks of one
allocation, whatever their kind. So vLLM is left as many blocks as the other layers need, and the bytes
of the rest are the pool, with blocks of account of its own.
"""

from dataclasses import dataclass, replace
from typing import Any

from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MambaSpec

from diffkv.quant import ConfigError
from diffkv.shape import PoolShape
from diffkv.vllm_plugin.matrix_row import WITHOUT
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
        max_concurrency: requests of the longest length that fit both.
    """

    num_blocks: int
    block_bytes: int
    pool_bytes: int
    num_layers: int
    num_others: int
    max_concurrency: float

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
            "DiffKV's connector runs without its attention backend: pass "
            "--attention-config.backend_per_kind.full_attention CUSTOM"
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
    groups, total = kv_cache_config.kv_cache_groups, kv_cache_config.num_blocks
    size = kv_cache_config.kv_cache_tensors[0].size
    block_bytes = size // total
    if any(getattr(group.kv_cache_spec, "mamba_cache_mode", "none") != "none" for group in groups):
        raise ConfigError(
            "prefix caching does not go with a model whose layers have a recurrent state: pass "
            "--no-enable-prefix-caching"
        )
    needs = _Needs.of(groups, spec, vllm_config)
    num_blocks = needs.blocks_of(total, block_bytes, vllm_config.scheduler_config.max_num_seqs)
    _shrink(kv_cache_config, num_blocks)
    pool_bytes = size - num_blocks * block_bytes
    return Division(
        num_blocks,
        block_bytes,
        pool_bytes,
        spec.num_layers,
        sum(len(group.layer_names) for group in groups) - spec.num_layers,
        min(pool_bytes / needs.longest_bytes, (num_blocks - 1) / needs.longest_blocks),
    )


def _shrink(kv_cache_config: Any, num_blocks: int) -> None:
    """Plan vLLM's allocation for fewer blocks.

    Where a block is in one piece nothing but the size changes; else each layer has its blocks in a row,
    and the layers follow each other.
    """
    before = kv_cache_config.num_blocks

    def fewer(num_bytes: int) -> int:
        return num_bytes // before * num_blocks

    tensors = []
    for tensor in kv_cache_config.kv_cache_tensors:
        moved = {"size": fewer(tensor.size)}
        if tensor.block_stride <= tensor.layer_stride:
            moved["layer_stride"] = fewer(tensor.layer_stride)
            moved["offset"] = fewer(tensor.offset)
        tensors.append(replace(tensor, **moved))
    kv_cache_config.num_blocks, kv_cache_config.kv_cache_tensors = num_blocks, tensors


@dataclass(frozen=True)
class _Needs:
    """What requests need of either part.

    Attributes:
        typical_bytes: bytes of the pool for one of the typical length.
        longest_bytes: likewise for one of the longest.
        most_bytes: likewise, however its tokens are tiered, with all tables: the least pool.
        longest_blocks: blocks for one of the longest length.
        blocks: (for each request, for the steps that run) by group of layers: blocks for requests of
            the typical length.
    """

    typical_bytes: int
    longest_bytes: int
    most_bytes: int
    longest_blocks: int
    blocks: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, groups: list[Any], spec: DividedSpec, vllm_config: Any) -> "_Needs":
        """Those of a model's groups of layers."""
        longest = vllm_config.model_config.max_model_len
        typical = max(1, int(TYPICAL_SHARE * longest))
        sizes = spec.layout, spec.num_layers, spec.num_kv_heads
        others = [group.kv_cache_spec for group in groups if group.kv_cache_spec is not spec]
        in_flight = vllm_config.max_in_flight_tokens
        return cls(
            PoolShape.request_bytes(*sizes, typical, spec.segment),
            PoolShape.request_bytes(*sizes, longest, spec.segment),
            spec.least_pool_bytes(longest),
            sum(_longest_blocks(each, vllm_config) for each in others),
            tuple(_typical_blocks(each, typical, in_flight) for each in others),
        )

    def blocks_of(self, total: int, block_bytes: int, max_num_seqs: int) -> int:
        """Blocks for the layers that keep vLLM's cache, its first included, which is nobody's.

        Enough for the most requests of the typical length for which the pool is too, and never too few
        or too many for one request of the longest length, which vLLM has made sure of.
        """
        least, most = 1 + self.longest_blocks, total - -(-self.most_bytes // block_bytes)
        assert least <= most, (
            f"vLLM starts with {total} blocks, {least} and {total - most} are needed"
        )
        fitting = least
        for num_requests in range(1, max_num_seqs + 1):
            wanted = 1 + sum(num_requests * each + steps for each, steps in self.blocks)
            if wanted * block_bytes + num_requests * self.typical_bytes > total * block_bytes:
                break
            fitting = wanted
        return max(least, min(fitting, most))


def _longest_blocks(spec: Any, vllm_config: Any) -> int:
    return int(-(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes))


def _typical_blocks(spec: Any, num_tokens: int, in_flight: int) -> tuple[int, int]:
    """Blocks for each request, and for all tokens of the steps that run.

    A window or a chunk needs those of its latest tokens; a state is as large for any number of them.
    """
    if isinstance(spec, MambaSpec):
        return 1, 0
    has_chunks = isinstance(spec, ChunkedLocalAttentionSpec)
    held = min(num_tokens, spec.attention_chunk_size if has_chunks else spec.sliding_window)
    return 1 + -(-held // spec.block_size), -(-in_flight // spec.block_size)
