"""The manager of vLLM's blocks that keeps each request's quota.

A request owns one block whose id tells the worker which request a row belongs to, and as many more as
its pages may need before the next report. So quota >= real pages always, and what compression frees
admits other requests.

A prompt that is computed in one step gets a quota of its expected size, and the worker a limit: it gives
a prompt up that would exceed it. The request is then preempted, and computed again with its worst case.
"""

from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import RequestStatus

from diffkv.vllm_plugin.messages import PagesHeld
from diffkv.vllm_plugin.scheduler.estimate import Prompt, PromptSizes
from diffkv.vllm_plugin.spec import DiffKVSpec

__all__ = ["DiffKVManager", "register_spec"]


class DiffKVManager(FullAttentionManager):
    """Keeps quotas on the scheduler's side, from the reports of the worker.

    Attributes:
        shape: the pool's.
    """

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: DiffKVSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._layout = kv_cache_spec.layout
        self._num_layers = kv_cache_spec.num_layers
        self._quotas: dict[str, list[Any]] = {}
        self._reports: dict[str, PagesHeld] = {}
        self._num_tokens: dict[str, int] = {}
        self._sizes = PromptSizes()
        self._prompts: dict[str, Prompt] = {}
        self._given_up: set[str] = set()
        self._must_leave: set[str] = set()
        self._requests: dict[str, Any] = {}
        self._restarted: set[str] = set()
        self._epochs: dict[str, int] = {}
        self._num_epochs = 0
        self._reserve_tables(kv_cache_spec)

    def _reserve_tables(self, spec: DiffKVSpec) -> None:
        """Take out of circulation the blocks whose bytes are the pool's tables.

        Lowering `num_gpu_blocks` with them keeps vLLM's usage figure 0 for an empty pool.
        """
        num_blocks = self.block_pool.num_gpu_blocks
        self.shape = spec.pool_shape(num_blocks)
        num_usable = self.shape.num_pages // spec.num_layers
        num_reserved = max(0, num_blocks - 1 - num_usable)
        self.block_pool.get_new_blocks(num_reserved)
        self.block_pool.num_gpu_blocks -= num_reserved

    def know(self, request: Any) -> None:
        """A request arrives."""
        self._requests[request.request_id] = request

    def expect(self, request_id: str, prompt: Prompt | None) -> None:
        """Before a request is admitted: its prompt, or None if the worst case is to be set aside."""
        if prompt is None:
            self._prompts.pop(request_id, None)
        else:
            self._prompts[request_id] = prompt

    def begin(self, request_id: str) -> int:
        """A request is admitted, or resumed: the number of this admission.

        A report that comes late may be about the one before, whose pages are gone.
        """
        self._num_epochs += 1
        self._epochs[request_id] = self._num_epochs
        return self._num_epochs

    def forget(self, request_id: str) -> None:
        """A request finished: it will not come back."""
        self._requests.pop(request_id, None)
        self._prompts.pop(request_id, None)
        self._given_up.discard(request_id)

    def take_restarted(self) -> set[str]:
        """Requests that are computed anew, since this was last asked: their pages are to be released."""
        restarted, self._restarted = self._restarted, set()
        return restarted

    def _goes_on(self, request_id: str) -> bool:
        """Whether a request waits that was computed in part: more of its prompt has come (sessions)."""
        request = self._requests.get(request_id)
        return (
            request is not None
            and request.status != RequestStatus.RUNNING
            and request.num_computed_tokens > 0
        )

    def _restart(self, request_id: str) -> None:
        """Have a request computed from its first token.

        What is stored was decided without the tokens that have come, and some of it is dropped, so they
        cannot be added to it. vLLM asks for the request's admission anew, as after a preemption.
        """
        self._requests[request_id].num_computed_tokens = 0
        self.free(request_id)
        self._restarted.add(request_id)

    def limits(self, request_ids: list[str]) -> dict[str, int]:
        """Pages that prompts of the step that was just scheduled may take, where they might need more.

        What no request has is divided among them. It stays free until their reports come, so that
        their quotas can be raised to what they took.
        """
        bets = {}
        for name in request_ids:
            prompt = self._prompts.get(name)
            if prompt is not None and prompt.num_tokens == self._num_tokens[name]:
                missing = self._blocks(self._most_pages(prompt.num_tokens)) - self._held(name)
                if missing > 0:
                    bets[name] = missing
        share = self.block_pool.get_num_free_blocks() // len(bets) if bets else 0
        return {
            name: (self._held(name) + share) * self._num_layers
            for name, missing in bets.items()
            if missing > share
        }

    def on_report(self, request_id: str, report: PagesHeld) -> None:
        """Take a worker's report: return what of the request's quota it does not need.

        A prompt that is larger than expected has stayed within its limit, so the blocks are there.
        """
        if request_id not in self._quotas or report.epoch != self._epochs[request_id]:
            return  # finished or preempted meanwhile
        self._reports[request_id] = report
        if report.given_up:
            self._given_up.add(request_id)
            self._must_leave.add(request_id)
        else:
            self._learn(request_id, report)
        quota = self._quotas[request_id]
        surplus = self._held(request_id) - self._needed(request_id, self._num_tokens[request_id])
        if surplus > 0:
            self.block_pool.free_blocks(quota[-surplus:])
            del quota[-surplus:]
        elif surplus < 0:
            quota.extend(self.block_pool.get_new_blocks(-surplus))

    def _learn(self, request_id: str, report: PagesHeld) -> None:
        """Note the size of a prompt that is complete."""
        prompt = self._prompts.get(request_id)
        if prompt is not None and prompt.num_tokens == report.num_tokens:
            self._sizes.observe(prompt, report.num_pages / self._most_pages(report.num_tokens))

    def _most_pages(self, num_tokens: int) -> int:
        """Pages that a request of `num_tokens` tokens can need, however they are tiered."""
        return self.shape.num_heads * self._layout.max_pages(num_tokens)

    def _blocks(self, pages: int) -> int:
        return max(1, -(-pages // self._num_layers))

    def _needed(self, request_id: str, num_tokens: int) -> int:
        """Blocks that the request gets for `num_tokens` tokens.

        They cover its pages at worst; before its first report, those of a prompt that is computed in
        one step as expected.
        """
        pages = self._most_pages(num_tokens)
        report = self._reports.get(request_id)
        prompt = self._prompts.get(request_id)
        if report is not None:
            more = num_tokens - report.num_tokens
            if 0 < more <= len(report.growth):
                growth = report.growth[more - 1]
            else:
                growth = self.shape.num_heads * self._layout.max_new_pages(more)
            pages = min(pages, report.num_pages + growth)
        elif prompt is not None and request_id not in self._given_up:
            if num_tokens == prompt.num_tokens:
                pages = self._sizes.expected(prompt, pages)
        return self._blocks(pages)

    def _held(self, request_id: str) -> int:
        return len(self.req_to_blocks.get(request_id, ())) + len(self._quotas.get(request_id, ()))

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Blocks that must be free for the request to grow to `num_tokens` tokens.

        More than there are where a prompt was given up: the scheduler then preempts the request. And
        where a session goes on, so that it is not scheduled before it has been restarted.
        """
        if self._goes_on(request_id):
            self._restart(request_id)
            return self.block_pool.num_gpu_blocks
        if request_id in self._must_leave:
            return self.block_pool.num_gpu_blocks
        held, prompt = self._held(request_id), self._prompts.get(request_id)
        if not held and prompt is not None and num_tokens < prompt.num_tokens:
            # The first of several chunks, all stored high. vLLM has asked whether the whole prompt
            # fits, and was told what it takes in one step.
            return self._blocks(self._most_pages(prompt.num_tokens))
        return max(0, self._needed(request_id, num_tokens) - held)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Raise the request's quota; the worker is only ever told of the one block that is its id."""
        missing = max(0, self._needed(request_id, num_tokens) - self._held(request_id))
        blocks = self.block_pool.get_new_blocks(missing) if missing else []
        ids = self.req_to_blocks[request_id]
        new_ids: list[Any] = []
        if not ids:
            new_ids, blocks = blocks[:1], blocks[1:]
            ids.extend(new_ids)
            self.num_cached_block[request_id] = 0
        self._quotas.setdefault(request_id, []).extend(blocks)
        self._num_tokens[request_id] = num_tokens
        return new_ids

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """The request leaves, for good or until it is resumed; its whole quota is free."""
        self._reports.pop(request_id, None)
        self._num_tokens.pop(request_id, None)
        self._epochs.pop(request_id, None)
        self._must_leave.discard(request_id)
        return super().pop_blocks_for_free(request_id) + self._quotas.pop(request_id, [])

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """Nothing is shared between requests."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def add_local_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is shared between requests."""

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is shared between requests."""

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Blocks are not tied to tokens."""


def register_spec() -> None:
    """Make the spec and its manager known to vLLM.

    The registry fills itself with vLLM's own specs only while it is empty, so they go first.
    """
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(DiffKVSpec, DiffKVManager, uniform_type_base_spec=DiffKVSpec)
