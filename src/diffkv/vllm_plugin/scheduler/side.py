"""The scheduler's side of the connector: settings, and what the workers are told of a step."""

from typing import Any

from vllm.logger import init_logger

from diffkv.policy import Thresholds
from diffkv.quant import ConfigError
from diffkv.shape import PoolShape
from diffkv.vllm_plugin.division import Division
from diffkv.vllm_plugin.messages import ReportMessage, StepMessage
from diffkv.vllm_plugin.options import WORST_CASE, Options
from diffkv.vllm_plugin.requests import admission_path, thresholds_of
from diffkv.vllm_plugin.scheduler.banner import banner
from diffkv.vllm_plugin.scheduler.manager import DiffKVManager

__all__ = ["SchedulerSide", "limit_steps"]

logger = init_logger("vllm.diffkv")

MOST_OF_A_STEP = 0.25
"""Share of the pool that a step's prompts may take, if all of their tokens are high."""


class SchedulerSide:
    """Knows every request from its arrival to its end.

    Args:
        options: the engine's.
        vllm_config: vLLM's configuration.
        kv_cache_manager: vLLM's, which holds ours.
        division: how the KV memory is divided, if not all layers have DiffKV's cache.
    """

    def __init__(
        self,
        options: Options,
        vllm_config: Any,
        kv_cache_manager: Any,
        division: Division | None = None,
    ) -> None:
        self._options = options
        self._manager = _manager_of(kv_cache_manager)
        if division is not None:
            watermark = vllm_config.scheduler_config.watermark
            self._manager.take_part(division, kv_cache_manager.coordinator.free, watermark)
        self._thresholds: dict[str, Thresholds] = {}
        worst = options.admission == WORST_CASE
        self._manager.attach(vllm_config, self._thresholds_of, worst)
        for line in banner(options, self._manager.shape, vllm_config, division):
            logger.info(line)
        limit_steps(vllm_config.scheduler_config, self._manager.shape)
        if division is not None:
            longest = vllm_config.model_config.max_model_len
            vllm_config.cache_config.kv_cache_max_concurrency = division.max_concurrency
            vllm_config.cache_config.kv_cache_size_tokens = int(division.max_concurrency * longest)
        _report_capacity(vllm_config.cache_config)

    def arrive(self, request: Any) -> None:
        """Take note of a request, and read its settings."""
        self._thresholds[request.request_id] = self._read(request)
        self._manager.know(request)

    def _thresholds_of(self, request: Any) -> Thresholds:
        """A request's thresholds as they are now: each part of a session has its own."""
        if request.resumable:
            return self._read(request)
        return self._thresholds[request.request_id]

    def _read(self, request: Any) -> Thresholds:
        """A request's thresholds.

        A bad one gets here only if vLLM was started without our admission check.
        """
        extra_args = getattr(request.sampling_params, "extra_args", None)
        try:
            return thresholds_of(extra_args, self._options)
        except ConfigError as error:
            logger.error(
                f"Request {request.request_id} runs with the engine's thresholds: {error}. Start vLLM "
                f"with --logits-processors {admission_path(self._options)} to refuse such requests"
            )
            return self._options.thresholds()

    def waits(self, request: Any) -> bool:
        """Whether a request should wait for rows that another one is about to compute."""
        return self._manager.waits_for_rows(request)

    def awaits_reports(self) -> bool:
        """Whether blocks will be given back without anybody being preempted."""
        return self._manager.awaits_reports()

    def message(self, scheduler_output: Any) -> StepMessage:
        """Tell the workers what is gone, what starts with this step, and what it completes."""
        back = self._manager.take_restarted() | set(scheduler_output.preempted_req_ids or ())
        num_tokens = _tokens_after(scheduler_output)
        return StepMessage(
            released=self._manager.store.take_released(),
            ended=back | set(scheduler_output.finished_req_ids),
            back=back,
            started=self._manager.take_started(),
            closing=self._manager.close_rows(),
            num_tokens=num_tokens,
            failed={name for name in self._manager.failures.names if name in num_tokens},
        )

    def take(self, message: ReportMessage) -> None:
        """Fit what requests and rows own to what the workers say they hold."""
        for name, report in message.reports.items():
            self._manager.on_report(name, report)

    def finish(self, request: Any) -> None:
        """Forget a request. The workers release its pages with the next step's message."""
        self._manager.forget(request)
        self._thresholds.pop(request.request_id, None)

    def reset(self) -> bool:
        """Have no row found any more."""
        self._manager.store.clear()
        return True


def limit_steps(scheduler_config: Any, shape: PoolShape) -> None:
    """Have a step compute no more than a pool can take that is all high, with room for what it holds.

    vLLM's scheduler reads this limit in each step, and has prompts computed in more chunks. It stays
    where an image must be in one chunk: vLLM has compared the largest with it.
    """
    if not scheduler_config.enable_chunked_prefill or scheduler_config.disable_chunked_mm_input:
        return
    layouts = shape.layout.exact(), shape.layout
    fewest = min(tier.tokens_per_page for layout in layouts for tier in layout.tiers)
    pages = int(MOST_OF_A_STEP * shape.num_pages) // shape.num_heads - len(shape.layout.tiers)
    limit = max(pages * fewest, scheduler_config.max_num_seqs)
    if limit < scheduler_config.max_num_batched_tokens:
        logger.info(
            f"DiffKV: a step computes {limit} tokens at most, not "
            f"{scheduler_config.max_num_batched_tokens}: they may take "
            f"{MOST_OF_A_STEP:.0%} of the pool before they are compressed"
        )
        scheduler_config.max_num_batched_tokens = limit


def _report_capacity(cache_config: Any) -> None:
    """Make blocks times tokens of a block the capacity in tokens, as who reads them takes it to be.

    Autoscalers and routers multiply these figures (`vllm:cache_config_info`). A real block is a page of
    every layer. The scheduler and the workers have read the number by now.
    """
    cache_config.num_gpu_blocks = cache_config.kv_cache_size_tokens // cache_config.block_size


def _manager_of(kv_cache_manager: Any) -> Any:
    managers = kv_cache_manager.coordinator.single_type_managers
    return next(manager for manager in managers if isinstance(manager, DiffKVManager))


def _tokens_after(scheduler_output: Any) -> dict[str, int]:
    """Tokens of each scheduled request after the step."""
    added, cached = scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_cached_reqs
    after = {
        name: count + added[name]
        for name, count in zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        if name in added
    }
    for new in scheduler_output.scheduled_new_reqs:
        if new.req_id in added:
            after[new.req_id] = new.num_computed_tokens + added[new.req_id]
    return after
