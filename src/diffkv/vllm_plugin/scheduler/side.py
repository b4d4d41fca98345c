"""The scheduler's side of the connector: settings, quotas, and what the workers are told of a step."""

from dataclasses import replace
from typing import Any

from vllm.logger import init_logger

from diffkv.policy import Thresholds
from diffkv.quant import ConfigError
from diffkv.vllm_plugin.messages import ReportMessage, Started, StepMessage
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.requests import admission_path, thresholds_of
from diffkv.vllm_plugin.scheduler.banner import banner
from diffkv.vllm_plugin.scheduler.estimate import Prompt, longest_whole, why_worst_case
from diffkv.vllm_plugin.scheduler.manager import DiffKVManager

__all__ = ["SchedulerSide"]

logger = init_logger("vllm.diffkv")


class SchedulerSide:
    """Knows every request from its arrival to its end.

    Args:
        options: the engine's.
        vllm_config: vLLM's configuration.
        kv_cache_manager: vLLM's, which holds ours.

    Raises:
        ConfigError: ours is not there, or not alone.
    """

    def __init__(self, options: Options, vllm_config: Any, kv_cache_manager: Any) -> None:
        self._options = options
        self._manager = _only_manager(kv_cache_manager)
        self._longest_expected = (
            longest_whole(vllm_config) if why_worst_case(vllm_config, options) is None else 0
        )
        self._thresholds: dict[str, Thresholds] = {}
        self._started: list[Started] = []
        for line in banner(options, self._manager.shape, vllm_config):
            logger.info(line)
        _report_capacity(vllm_config.cache_config)

    def arrive(self, request: Any) -> None:
        """Take note of a request, and read its settings."""
        self._manager.know(request)
        self._thresholds[request.request_id] = self._read(request)

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

    def expect(self, request: Any) -> None:
        """Describe a waiting request's prompt, before its quota is asked for."""
        if request.resumable:  # each part of a session has settings of its own
            self._thresholds[request.request_id] = self._read(request)
        prompt = None
        if request.num_tokens <= self._longest_expected:
            prompt = Prompt(request.num_tokens, self._thresholds[request.request_id])
        self._manager.expect(request.request_id, prompt)

    def start(self, request: Any, block_id: int) -> None:
        """Note a request that starts, or resumes: all tokens it has now are its prompt."""
        name = request.request_id
        epoch = self._manager.begin(name)
        self._started.append(
            Started(name, block_id, request.num_tokens, self._thresholds[name], epoch)
        )

    def message(self, scheduler_output: Any) -> StepMessage:
        """Tell the workers what ended, and what starts with this step."""
        ended = set(scheduler_output.finished_req_ids)
        ended.update(scheduler_output.preempted_req_ids or ())
        ended.update(self._manager.take_restarted())
        limits = self._manager.limits([start.request_id for start in self._started])
        started = [
            replace(start, max_pages=limits.get(start.request_id)) for start in self._started
        ]
        self._started = []
        return StepMessage(ended, started, _tokens_after(scheduler_output))

    def take(self, message: ReportMessage) -> None:
        """Fit quotas to what the workers say requests hold."""
        for name, report in message.reports.items():
            self._manager.on_report(name, report)

    def finish(self, request_id: str) -> None:
        """Forget a request. The workers release its pages with the next step's message."""
        self._manager.forget(request_id)
        self._thresholds.pop(request_id, None)


def _report_capacity(cache_config: Any) -> None:
    """Make blocks times tokens of a block the capacity in tokens, as who reads them takes it to be.

    Autoscalers and routers multiply these figures (`vllm:cache_config_info`). A real block is a page of
    every layer, and its size in tokens is that of the longest request, so that a row of a block table
    has one entry. The scheduler and the workers have read both by now.
    """
    cache_config.block_size = cache_config.DEFAULT_BLOCK_SIZE
    cache_config.num_gpu_blocks = cache_config.kv_cache_size_tokens // cache_config.block_size


def _only_manager(kv_cache_manager: Any) -> DiffKVManager:
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
    return managers[0]


def _tokens_after(scheduler_output: Any) -> dict[str, int]:
    """Tokens of each scheduled request after the step."""
    computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    cached = scheduler_output.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    added = scheduler_output.num_scheduled_tokens
    return {name: count + added[name] for name, count in computed.items() if name in added}
