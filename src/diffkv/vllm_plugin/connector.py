"""The KV connector: vLLM's way from the scheduler to the workers and back, once a step.

It transfers no KV. What vLLM calls in the engine core goes on to a `SchedulerSide`, what it calls in a
worker to a `WorkerCache`.
"""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from diffkv.vllm_plugin.division import divide
from diffkv.vllm_plugin.messages import ReportMessage, StepMessage
from diffkv.vllm_plugin.metrics import DiffKVPromMetrics, DiffKVStats
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.scheduler.side import SchedulerSide
from diffkv.vllm_plugin.support import check_config
from diffkv.vllm_plugin.worker.cache import WorkerCache
from diffkv.vllm_plugin.worker.runner import follow_batches

__all__ = ["DiffKVConnector"]


class DiffKVConnector(KVConnectorBase_V1, SupportsHMA):
    """One in the engine core and one in each worker.

    Attributes:
        scheduler: set in the engine core, when vLLM has made its manager of blocks.
        worker: set in a worker, when vLLM has allocated the KV cache.
    """

    requires_kv_delivery = False
    scheduler: SchedulerSide
    worker: WorkerCache

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._options = Options.parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
        check_config(vllm_config, self._options)
        self._division = divide(kv_cache_config, vllm_config)
        if self._division is not None:
            vllm_config.cache_config.enable_prefix_caching = False

    # in the engine core

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Find our manager of blocks behind vLLM's."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.scheduler = SchedulerSide(
            self._options, self._vllm_config, kv_cache_manager, self._division
        )

    def on_new_request(self, request: Any) -> None:
        """A request arrives."""
        self.scheduler.arrive(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Nothing comes from outside; but a request may wait for rows that another one computes."""
        return (None if self.scheduler.waits(request) else 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The manager of blocks has noted that the request starts, or resumes."""

    def has_pending_block_frees(self) -> bool:
        """Whether a running request that gets no blocks should wait rather than preempt another."""
        return self.scheduler.awaits_reports()

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Last call before a step."""
        return self.scheduler.message(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """First call after a step."""
        message = connector_output.kv_connector_worker_meta
        if isinstance(message, ReportMessage):
            self.scheduler.take(message)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks may be freed at once: the workers release pages in the order of steps."""
        self.scheduler.finish(request)
        return False, None

    def reset_cache(self) -> bool:
        """Have no row found any more; vLLM's own reset gives up those that nobody uses."""
        return self.scheduler.reset()

    # in a worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Make the pool in the allocation that vLLM made for all layers."""
        self.worker = WorkerCache(
            kv_caches, self._options, self._vllm_config, self._kv_cache_config, self._division
        )
        if self._vllm_config.use_v2_model_runner:
            follow_batches(self._vllm_config, self.worker)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """First call of a step, also of one without tokens."""
        message = kv_connector_metadata
        assert isinstance(message, StepMessage), f"not a message of DiffKV: {message!r}"
        self.worker.before_step(message)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Requests that vLLM has to end with an error, by the blocks that are their identities."""
        return self.worker.load_errors()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Last call of a step."""
        return ReportMessage(self.worker.report())

    def get_kv_connector_stats(self) -> DiffKVStats | None:
        """Figures of the pool after a step; the scheduler's side has none."""
        if self.role is KVConnectorRole.SCHEDULER:
            return None
        return self.worker.stats(get_tensor_model_parallel_rank())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """No KV comes from outside."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No KV comes from outside."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """No KV goes outside."""

    def wait_for_save(self) -> None:
        """No KV goes outside."""

    # in the API process

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> DiffKVStats:
        """Figures as they were sent between processes."""
        return DiffKVStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> DiffKVPromMetrics:
        """Gauges for /metrics."""
        return DiffKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
