"""What vLLM's second model runner is asked and told beyond its interfaces."""

import functools
from typing import Any
from weakref import WeakValueDictionary

from diffkv.vllm_plugin.options import options_of
from diffkv.vllm_plugin.worker.cache import WorkerCache

__all__ = ["follow_batches"]

_workers: WeakValueDictionary[int, WorkerCache] = WeakValueDictionary()
"""By the identity of their engine's configuration."""


def follow_batches(vllm_config: Any, worker: WorkerCache) -> None:
    """Tell a worker whose rows a batch has, and replay no whole CUDA graph in a step with a prompt.

    The runner counts a prompt of which one token is left as a generated token, since most backends
    attend to both alike. Here such a token may complete a row, and others may wait with it. Nothing
    asks a backend about a batch, nor tells one its order but on the device, which one would wait for.
    So the method that gathers the batch is wrapped, once in a process; engines without DiffKV keep its
    answer.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    _workers[id(vllm_config)] = worker
    gather = GPUModelRunner.gather_batch_req_state
    if hasattr(gather, "__wrapped__"):
        return

    @functools.wraps(gather)
    def gathered(self: Any, scheduler_output: Any, dummy_run: bool) -> tuple[Any, int | None]:
        state, tokens_each = gather(self, scheduler_output, dummy_run)
        if state is None or options_of(self.vllm_config) is None:
            return state, tokens_each
        if follower := _workers.get(id(self.vllm_config)):
            follower.note_batch(state.req_ids)
        return state, None if state.has_prefill else tokens_each

    GPUModelRunner.gather_batch_req_state = gathered
