"""The KV connector: carries messages between the scheduler and the workers, once a step.

Down: which requests ended and which start. Up: how many pages each request holds. It transfers no KV.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from diffkv.policy import Thresholds
from diffkv.quant import ConfigError
from diffkv.vllm_plugin.metrics import DiffKVPromMetrics, DiffKVStats
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.requests import Settings, admission_path
from diffkv.vllm_plugin.scheduler.banner import banner
from diffkv.vllm_plugin.scheduler.estimate import Prompt, longest_whole, why_worst_case
from diffkv.vllm_plugin.scheduler.spec import DiffKVManager, DiffKVSpec, Report
from diffkv.vllm_plugin.support import check_config
from diffkv.vllm_plugin.worker.cache import Started, WorkerCache

__all__ = ["DiffKVConnector"]

logger = init_logger("vllm.diffkv")


@dataclass
class StepMessage(KVConnectorMetadata):
    """From the scheduler to every worker, before a step.

    Attributes:
        ended: requests that finished or were preempted.
        started: requests that start, or resume.
        num_tokens: tokens of each scheduled request after the step.
    """

    ended: set[str] = field(default_factory=set)
    started: list[Started] = field(default_factory=list)
    num_tokens: dict[str, int] = field(default_factory=dict)


@dataclass
class ReportMessage(KVConnectorWorkerMetadata):
    """From a worker to the scheduler, after a step."""

    reports: dict[str, Report]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "ReportMessage":
        """Join the reports of two ranks: the fullest rank decides."""
        assert isinstance(other, ReportMessage)
        joined = {
            name: report.fullest(other.reports.get(name, report))
            for name, report in self.reports.items()
        }
        return ReportMessage({**other.reports, **joined})


def _tokens_after(scheduler_output: Any) -> dict[str, int]:
    """Tokens of each scheduled request after the step."""
    computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    cached = scheduler_output.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    added = scheduler_output.num_scheduled_tokens
    return {name: count + added[name] for name, count in computed.items() if name in added}


class DiffKVConnector(KVConnectorBase_V1, SupportsHMA):
    """One in the scheduler, which knows quotas, and one in each worker, which owns a pool."""

    requires_kv_delivery = False

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._options = Options.parse(transfer.kv_connector_extra_config)
        check_config(vllm_config, self._options)
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._manager: DiffKVManager | None = None
        self._started: list[Started] = []
        self._expects_sizes = why_worst_case(vllm_config, self._options.admission) is None
        self._worker: WorkerCache | None = None

    # scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Find our manager among vLLM's."""
        super().bind_kv_cache_manager(kv_cache_manager)
        managers = kv_cache_manager.coordinator.single_type_managers
        if not any(isinstance(manager, DiffKVManager) for manager in managers):
            raise ConfigError(
                "DiffKV's connector runs without its attention backend: pass --attention-backend CUSTOM"
            )
        if len(managers) != 1:
            raise ConfigError(
                "DiffKV needs all attention layers of the model to be alike; "
                "serve this model without DiffKV"
            )
        (self._manager,) = managers
        for line in banner(self._options, managers[0].shape, self._vllm_config):
            logger.info(line)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Nothing comes from outside; but it is the call before a prompt's quota is asked for."""
        assert self._manager is not None
        prompt = None
        if self._expects_sizes and request.num_tokens <= longest_whole(self._vllm_config):
            prompt = Prompt(request.num_tokens, self._request_thresholds(request))
        self._manager.expect(request.request_id, prompt)
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note a request that starts, or resumes: all tokens it has now are its prompt."""
        block_id = blocks.get_block_ids()[0][0]
        thresholds = self._request_thresholds(request, log=True)
        assert self._manager is not None
        life = self._manager.begin(request.request_id)
        self._started.append(
            Started(request.request_id, block_id, request.num_tokens, thresholds, life)
        )

    def _request_thresholds(self, request: Any, log: bool = False) -> Thresholds:
        """A bad setting gets here only if vLLM was started without our admission check."""
        engine = self._options.thresholds()
        try:
            settings = Settings.parse(
                getattr(request.sampling_params, "extra_args", None),
                self._options.request_thresholds(),
            )
        except ConfigError as error:
            if not log:
                return engine
            logger.error(
                "Request %s runs with the engine's thresholds: %s. Start vLLM with "
                "--logits-processors %s to refuse such requests",
                request.request_id,
                error,
                admission_path(self._options.request_thresholds()),
            )
            return engine
        return settings.thresholds(engine, self._options.quant_config().has_low)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Tell the workers what ended and what starts with this step."""
        ended = set(scheduler_output.finished_req_ids)
        ended.update(scheduler_output.preempted_req_ids or ())
        assert self._manager is not None
        limits = self._manager.limits([start.request_id for start in self._started])
        started = [
            replace(start, max_pages=limits.get(start.request_id)) for start in self._started
        ]
        message = StepMessage(ended, started, _tokens_after(scheduler_output))
        self._started = []
        return message

    def update_connector_output(self, connector_output: Any) -> None:
        """Shrink quotas to what the workers say requests hold."""
        message = connector_output.kv_connector_worker_meta
        if isinstance(message, ReportMessage):
            assert self._manager is not None
            for name, report in message.reports.items():
                self._manager.on_report(name, report)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks may be freed at once: the worker releases its pages in step order."""
        assert self._manager is not None
        self._manager.forget(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`."""
        return self.request_finished(request, [])

    # worker

    @property
    def worker(self) -> WorkerCache:
        """The pool of this worker."""
        assert self._worker is not None, "the KV cache is not allocated yet"
        return self._worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Make the pool in the allocation that vLLM made for all layers."""
        (group,) = self._kv_cache_config.kv_cache_groups
        spec = group.kv_cache_spec
        assert isinstance(spec, DiffKVSpec), f"vLLM merged the specs to {type(spec).__name__}"
        storage = next(iter(kv_caches.values())).untyped_storage()
        buffer = torch.empty(0, dtype=torch.int8, device=storage.device).set_(storage)
        layers = self._vllm_config.compilation_config.static_forward_context
        scales = {layers[name].impl.scale for name in group.layer_names}
        if len(scales) != 1:
            raise ConfigError(f"DiffKV needs one attention scale for all layers, got {scales}")
        num_blocks = self._kv_cache_config.num_blocks
        late = storage.device.type == "cuda" and self._vllm_config.max_concurrent_batches > 1
        self._worker = WorkerCache(self._options, spec, num_blocks, buffer, scales.pop(), late)
        for name in group.layer_names:
            layers[name].impl.worker = self._worker
        self._worker.cache.warm_up(layers[group.layer_names[0]].impl.num_heads)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """First call of a step, also of one without tokens: release what ended, open what starts."""
        assert isinstance(kv_connector_metadata, StepMessage)
        message = kv_connector_metadata
        self.worker.before_step(message.ended, message.started, message.num_tokens)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Last call of a step."""
        return ReportMessage(self.worker.report())

    def get_kv_connector_stats(self) -> DiffKVStats | None:
        """The pool's gauges; the scheduler's side has none."""
        if self._worker is None:
            return None
        return self._worker.stats(get_tensor_model_parallel_rank())

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

    # metrics, in the API process

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> DiffKVStats:
        """From what was sent between processes."""
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
