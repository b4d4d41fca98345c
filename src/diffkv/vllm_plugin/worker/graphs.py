"""Whole CUDA graphs are for steps of generated tokens alone."""

import functools
from typing import Any

from diffkv.vllm_plugin.options import options_of

__all__ = ["keep_prompts_out"]


def keep_prompts_out() -> None:
    """Have vLLM's second model runner replay no whole graph in a step with tokens of a prompt.

    It counts a prompt of which one token is left as a generated token, since most backends attend to
    both alike. Here such a token may complete a row, and others may wait with it. Nothing asks a
    backend about a batch, so the method that counts is wrapped, once in a process; engines without
    DiffKV keep its answer.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    count = GPUModelRunner.gather_batch_req_state
    if hasattr(count, "__wrapped__"):
        return

    @functools.wraps(count)
    def counted(self: Any, scheduler_output: Any, dummy_run: bool) -> tuple[Any, int | None]:
        state, tokens_each = count(self, scheduler_output, dummy_run)
        is_for_graphs = state is not None and tokens_each is not None
        if is_for_graphs and state.has_prefill and options_of(self.vllm_config) is not None:
            return state, None
        return state, tokens_each

    GPUModelRunner.gather_batch_req_state = counted
