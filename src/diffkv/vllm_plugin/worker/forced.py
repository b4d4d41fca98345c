"""Forced decoding: given tokens in place of sampled ones, and every distribution into a file.

A logits processor sees the raw logits of the whole vocabulary before a token is taken. It writes their
log-probabilities straight into a memory-mapped array: handed through vLLM's outputs they would become
one Python object for each entry of the vocabulary at each step.

As in `front.admission`, one class serves both of vLLM's interfaces of that name.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as RunnerV1Processor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as RunnerV2Processor,
)

__all__ = ["Forced"]

EXTRA_ARG = "forced"
"""Of a request's `extra_args`: a dict of `file`, `row` and `tokens`."""


@dataclass(frozen=True)
class _Trace:
    """What is done with one request.

    Attributes:
        log_probs: [steps, vocabulary] float32, mapped: the request's part of the file.
        tokens: what is generated; empty: what the model would choose.
    """

    log_probs: np.ndarray
    tokens: list[int]


class Forced(RunnerV1Processor, RunnerV2Processor):
    """Passed to vLLM as `--logits-processors diffkv.vllm_plugin.worker.forced:Forced`.

    Steps count from a request's first generated token. Those beyond what the file has room for, and
    requests that do not ask for it, are left alone.
    """

    def __init__(
        self, vllm_config: Any, device_or_states: Any, is_pin_memory: bool = False
    ) -> None:
        """Take what either runner gives: a device and pinning, or the requests' state."""
        self._states = device_or_states  # used with the second runner only
        self._traces: dict[int, _Trace] = {}
        self._outputs: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        """Forcing a token is a choice."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """First runner: follow requests to their places in the batch."""
        process_dict_updates(
            self._outputs, batch_update, lambda params, prompt, out: out if _asks(params) else None
        )
        process_dict_updates(self._traces, batch_update, lambda params, prompt, out: _trace(params))

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Second runner: a slot has a new request."""
        trace = _trace(sampling_params)
        self._traces.pop(req_idx, None)
        if trace is not None:
            self._traces[req_idx] = trace
        return trace is not None

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Write this step's distributions, then leave only the forced tokens possible.

        Args:
            logits: [rows, vocabulary] float32. Modified in place.
            ctx: the second runner's layout of the batch.
        """
        places = self._places(ctx) if self._traces else []
        places = [(row, t, step) for row, t, step in places if 0 <= step < len(t.log_probs)]
        if not places:
            return logits
        log_probs = logits[[row for row, _, _ in places]].log_softmax(-1).cpu().numpy()
        for (row, trace, step), values in zip(places, log_probs, strict=True):
            trace.log_probs[step] = values
            if trace.tokens:
                logits[row] = -torch.inf
                logits[row, trace.tokens[step]] = 0.0
        return logits

    def _places(self, ctx: Any) -> list[tuple[int, _Trace, int]]:
        """(row of the logits, trace, step) of each request that takes part.

        A chunk of a prompt that is not its last one has a row too: in the first runner it counts as
        step 0, which the last chunk writes again, in the second its step is negative.
        """
        if ctx is None:
            return [(row, t, len(self._outputs[row])) for row, t in self._traces.items()]
        places = []
        slots, positions = ctx.expanded_idx_mapping.tolist(), ctx.pos.tolist()
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            if slot in self._traces:
                step = position + 1 - int(self._states.prompt_len.np[slot])
                places.append((row, self._traces[slot], step))
        return places


def _asks(params: Any) -> bool:
    return EXTRA_ARG in (params.extra_args or {})


def _trace(params: Any) -> _Trace | None:
    if not _asks(params):
        return None
    asked = params.extra_args[EXTRA_ARG]
    file = np.load(asked["file"], mmap_mode="r+")
    return _Trace(file[asked["row"]], asked["tokens"])
