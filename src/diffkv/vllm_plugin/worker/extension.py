"""Methods that DiffKV adds to vLLM's workers, for `LLM.collective_rpc`."""

from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group

from diffkv.vllm_plugin.worker.pages import read_pool

__all__ = ["WorkerExtension"]


class WorkerExtension:
    """Mixed into the worker by `--worker-extension-cls`."""

    def diffkv_summary(self) -> dict[str, Any]:
        """Totals of this worker's pool, see `WorkerCache.summary`."""
        return get_kv_transfer_group().worker.summary()

    def diffkv_insight(self) -> list[dict[str, Any]]:
        """Every token of the requests that have not been released yet, see `pages.read_pool`.

        Without those in the middle of a prompt: what waits there has no tier.
        """
        worker = get_kv_transfer_group().worker
        requests = (
            (r.rows, r.num_tokens)
            for r in worker.requests.values()
            if r.num_tokens >= r.ends.prompt_len or r.num_tokens == r.start
        )
        return read_pool(worker.state, requests)
