"""Refuses bad per-request settings before a request is admitted.

vLLM asks every logits processor to validate a request's parameters in the process that receives
it, and answers a ValueError with HTTP 400. That hook is all that is used here: logits are left alone.

vLLM has two interfaces of that name, one for each model runner, and refuses a class of the other
one. Which runner an engine takes is known only after its options are given, so one class serves both.
"""

from typing import Any, ClassVar

import torch
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as RunnerV1Processor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as RunnerV2Processor,
)

from diffkv.quant import ConfigError
from diffkv.vllm_plugin.options import options_of
from diffkv.vllm_plugin.requests import THRESHOLDS, Settings

__all__ = ["Admission", "FixedAdmission", "HighAdmission"]


class Admission(RunnerV1Processor, RunnerV2Processor):
    """Passed to vLLM as `--logits-processors diffkv.vllm_plugin.front.admission:Admission`.

    It is for engines whose requests may set every threshold. vLLM tells a class nothing of the engine,
    so engines without sums of low tokens have classes of their own.

    Attributes:
        settable: thresholds that a request may set above 0.
    """

    settable: ClassVar[tuple[str, ...]] = THRESHOLDS

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ConfigError, a ValueError, for settings that make no sense."""
        Settings.parse(sampling_params.extra_args, cls.settable)

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool = False) -> None:
        """Take what either runner gives: a device and pinning, or, in its place, the requests' state.

        Raises:
            ConfigError: another option of vLLM has put a connector in the place of DiffKV's.
        """
        if options_of(vllm_config) is None:
            raise ConfigError(
                "DiffKV's connector was replaced: leave out --kv-offloading-size and other connectors"
            )

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Leave logits alone."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Nothing changes."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """There is no state."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """No request's logits are changed."""
        return False


class HighAdmission(Admission):
    """For engines with two tiers that drop no generated token."""

    settable = ("alpha_high",)


class FixedAdmission(Admission):
    """For engines with one tier that drop no generated token: there is nothing to decide."""

    settable = ()
