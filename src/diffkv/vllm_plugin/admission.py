"""Refuses bad per-request settings before a request is admitted.

vLLM asks every logits processor to validate a request's parameters in the process that receives it, and
answers a ValueError with HTTP 400. That hook is all that is used here: logits are left alone.
"""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from diffkv.vllm_plugin.requests import Settings

__all__ = ["Admission"]


class Admission(LogitsProcessor):
    """Passed to vLLM as `--logits-processors diffkv.vllm_plugin.admission:Admission`."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ConfigError, a ValueError, for settings that make no sense."""
        Settings.parse(sampling_params.extra_args)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave logits alone."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Nothing changes."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """There is no state."""
