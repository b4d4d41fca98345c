"""The manager for models in which other layers keep vLLM's cache: its blocks are a pool of their own.

vLLM adds up what all layers need and compares it with its one pool of blocks. Ours are not of that pool,
so the answer is none, or more than there are. vLLM's own caches outside of a device's memory do likewise
(`HiSparseSourceManager`).
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from diffkv.vllm_plugin.division import Division
from diffkv.vllm_plugin.scheduler.manager import DiffKVManager
from diffkv.vllm_plugin.scheduler.running import Running
from diffkv.vllm_plugin.spec import DiffKVSpec, DividedSpec

__all__ = ["DividedManager", "register_specs"]


class DividedManager(DiffKVManager):
    """Like `DiffKVManager`, with blocks that no other layer uses."""

    block_pool: BlockPool

    def take_part(self, division: Division, free: Callable[[str], None], watermark: float) -> None:
        """Complete the manager further, before `attach`.

        Args:
            division: how the KV memory is divided.
            free: frees what a request holds in the caches of all layers.
            watermark: share of the blocks that stay free when a request is admitted, if any runs.
        """
        self._division = division
        self._free_in_all = free
        self._watermark = watermark

    def _take_blocks(self, max_model_len: int) -> None:
        """Make blocks of account for the pool; none is missing from vLLM's."""
        theirs = self.block_pool
        self.shape = self.kv_cache_spec.pool_shape(self._division.pool_bytes, max_model_len)
        num_usable = self.shape.num_pages // self.shape.num_layers
        self.block_pool = BlockPool(1 + num_usable, False, theirs.hash_block_size)
        self._never = 1 + int(theirs.num_gpu_blocks)
        self._num_kept_free = int(self._watermark * num_usable)

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        """Of vLLM's blocks: none if there are enough of ours, else more than there are."""
        wanted = super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        free = self.block_pool.get_num_free_blocks()
        if self._running and request_id not in self._running:
            free -= self._num_kept_free
        return 0 if wanted <= free else self._never

    def _free_all(self, request_id: str) -> None:
        self._free_in_all(request_id)

    def _fail(self, running: Running, num_tokens: int) -> None:
        raise AssertionError(
            f"{num_tokens} tokens of a request need more than a pool that holds the longest one"
        )


def register_specs() -> None:
    """Make the specs and their managers known to vLLM.

    The registry fills itself with vLLM's own specs only while it is empty, so they go first.
    """
    register_all_kvcache_specs(None)
    for spec, manager in ((DiffKVSpec, DiffKVManager), (DividedSpec, DividedManager)):
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=DiffKVSpec)
