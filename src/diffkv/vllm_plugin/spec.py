"""vLLM's view of the pool: a KV-cache spec, in the place of the one that vLLM makes for a layer.

A vLLM block is only a unit of account here: one page for every layer. Scheduler and workers read the
pool's shape off the spec, so both have the same. `DividedSpec` is for layers of a model in which others
keep vLLM's cache, see `division`.
"""

from dataclasses import dataclass, replace
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from diffkv.layout import PageLayout
from diffkv.shape import PoolShape

__all__ = ["DiffKVSpec", "DividedSpec"]


@dataclass(frozen=True, kw_only=True)
class DiffKVSpec(FullAttentionSpec):
    """One layer's share of the pool: a block is one page of it.

    Attributes:
        layout: the pages of all layers.
        num_layers: layers that have it.
        max_model_len: tokens of the longest request.
        max_num_seqs: requests that may run at once.
        segment: tokens after which a row of a prompt is closed; 0: prompts are decided whole.
    """

    layout: PageLayout
    num_layers: int
    max_model_len: int
    max_num_seqs: int
    segment: int = 0

    @classmethod
    def of(
        cls,
        spec: AttentionSpec,
        layout: PageLayout,
        num_layers: int,
        max_model_len: int,
        max_num_seqs: int,
        segment: int = 0,
    ) -> "DiffKVSpec":
        """Make the spec of a layer for which vLLM would have used `spec`.

        A block has the size of vLLM's, since it hashes tokens by it. Block tables have a column for each
        block of the longest request, as slot mappings read them, but only the first ever holds an id.
        """
        return cls(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            dtype=spec.dtype,
            num_head_slots=1,
            state_content_bytes=cls.block_bytes(spec, layout),
            layout=layout,
            num_layers=num_layers,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            segment=segment,
        )

    @staticmethod
    def block_bytes(spec: AttentionSpec, layout: PageLayout) -> int:
        """One layer's bytes of a block: a page."""
        return layout.page_bytes

    def pool_bytes(self, num_blocks: int) -> int:
        """Bytes of the pool, if vLLM has allocated so many blocks."""
        return num_blocks * self.num_layers * self.layout.page_bytes

    def pool_shape(self, num_bytes: int, max_model_len: int | None = None) -> PoolShape:
        """The pool in so many bytes: scheduler and worker must agree on it.

        Args:
            num_bytes: bytes of pages and tables.
            max_model_len: vLLM's, if it was fitted to the memory after the spec was made
                (`--max-model-len auto`).
        """
        return PoolShape.fit(
            num_bytes,
            self.layout,
            self.num_layers,
            self.num_kv_heads,
            max_model_len or self.max_model_len,
            self.max_num_seqs,
            self.segment,
        )

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """A block is one opaque cell."""
        return 1

    @property
    def prefix_cacheable(self) -> bool:
        """Rows are shared, not blocks."""
        return False

    @property
    def block_table_token_alignment(self) -> None:
        """Block-table rows do not address tokens."""
        return None

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """This layer's share of what one request of the longest length needs, all tables included.

        vLLM itself sets the block aside that is nobody's.
        """
        needed = PoolShape.least_budget(
            self.layout,
            self.num_layers,
            self.num_kv_heads,
            vllm_config.model_config.max_model_len,
            self.max_num_seqs,
            self.segment,
        )
        return -(-needed // self.num_layers) - self.layout.page_bytes

    @classmethod
    def merge(cls, specs: list["DiffKVSpec"]) -> "DiffKVSpec":
        """All layers must be alike."""
        assert all(spec == specs[0] for spec in specs[1:]), "layers differ"
        return replace(specs[0])


@dataclass(frozen=True, kw_only=True)
class DividedSpec(DiffKVSpec):
    """Like `DiffKVSpec`, for a model in which other layers keep vLLM's cache.

    vLLM's blocks then have one size for all layers. So a layer's share of a block is as large as in
    vLLM's own cache, and says nothing of pages.
    """

    @staticmethod
    def block_bytes(spec: AttentionSpec, layout: PageLayout) -> int:
        """As many bytes as the layer would have without DiffKV."""
        return spec.page_size_bytes

    def least_pool_bytes(self, max_model_len: int) -> int:
        """Bytes that hold one request of the longest length, however its tokens are tiered.

        vLLM cannot end one request that is too large for its cache where layers differ in theirs, so
        there must be none.
        """
        return PoolShape.least_budget(
            self.layout,
            self.num_layers,
            self.num_kv_heads,
            max_model_len,
            self.max_num_seqs,
            self.segment,
            high_share=1,
        )

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """This layer's share of the pool that is needed at least."""
        return -(-self.least_pool_bytes(vllm_config.model_config.max_model_len) // self.num_layers)
