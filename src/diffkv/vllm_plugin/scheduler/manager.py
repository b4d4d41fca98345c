"""The manager of vLLM's blocks that has requests and rows pay for their pages.

A vLLM block is a page for every layer. A request owns one whose id tells the worker which request a row
of a batch belongs to, and as many more as the pages of its open row may need before the next report. A
closed row owns the blocks of its pages for as long as a request uses it, whichever it is. So blocks that
are owned cover the pages that are held, always, and what compression frees admits other requests.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import RequestStatus

from diffkv.policy import Thresholds
from diffkv.vllm_plugin.messages import PagesHeld, Started
from diffkv.vllm_plugin.scheduler.estimate import RowSizes
from diffkv.vllm_plugin.scheduler.failures import Failures
from diffkv.vllm_plugin.scheduler.hits import Hits, message_ends
from diffkv.vllm_plugin.scheduler.rows import Prefix, Row, RowStore
from diffkv.vllm_plugin.scheduler.running import Bounds, Need, Running
from diffkv.vllm_plugin.spec import DiffKVSpec

__all__ = ["DiffKVManager"]

_KEPT = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_ABORTED,
    RequestStatus.FINISHED_REPETITION,
)
"""Ends of a request after which what it stored is right."""


class DiffKVManager(FullAttentionManager):
    """Hands out blocks and slots on the scheduler's side, from the reports of the worker.

    Attributes:
        shape: the pool's.
        store: slots and closed rows.
        failures: requests that are too large for the whole pool.
    """

    supports_fine_grained_hash_lookup = False

    def __init__(self, kv_cache_spec: DiffKVSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._requests: dict[str, Any] = {}
        self._running: dict[str, Running] = {}
        self._closing: dict[str, Running] = {}
        self._started: list[Started] = []
        self._restarted: set[str] = set()
        self._is_starved = False
        self._num_epochs = 0

    def attach(self, vllm_config: Any, read: Callable[[Any], Thresholds], worst: bool) -> None:
        """Complete the manager, before anything is asked of it.

        vLLM makes it without its configuration, and without DiffKV's options.

        Args:
            vllm_config: vLLM's configuration, with the length that it has fitted to the memory.
            read: a request's thresholds.
            worst: whether requests are admitted by the most that they can take.
        """
        self._take_blocks(vllm_config.model_config.max_model_len)
        self._bounds = Bounds(self.shape)
        self._sizes = RowSizes(self.shape, worst)
        self.failures = Failures(self.block_pool)
        keeps = self.enable_caching and self.shape.segment > 0
        self.store = RowStore(self.shape.num_slots, self.block_pool, keeps)
        ends = message_ends(vllm_config.model_config)
        self._hits = Hits(self.store, self.shape, self.num_usable, self.block_size, ends, read)
        self._read = read
        self._scheduler_config = vllm_config.scheduler_config

    def _take_blocks(self, max_model_len: int) -> None:
        """Take out of circulation the blocks whose bytes are the pool's tables.

        Lowering `num_gpu_blocks` with them keeps vLLM's usage figure 0 for an empty pool.
        """
        num_blocks, spec = self.block_pool.num_gpu_blocks, self.kv_cache_spec
        self.shape = spec.pool_shape(spec.pool_bytes(num_blocks), max_model_len)
        num_usable = self.shape.num_pages // self.shape.num_layers
        num_reserved = max(0, num_blocks - 1 - num_usable)
        self.block_pool.get_new_blocks(num_reserved)
        self.block_pool.num_gpu_blocks -= num_reserved

    @property
    def num_usable(self) -> int:
        """Blocks that requests and rows can have."""
        return int(self.block_pool.num_gpu_blocks) - 1

    # requests come and go

    def know(self, request: Any) -> None:
        """A request arrives."""
        self._requests[request.request_id] = request
        self._hits.know(request)

    def forget(self, request: Any) -> None:
        """A request ended, and its blocks are about to be freed."""
        self._requests.pop(request.request_id, None)
        self._hits.forget(request)
        if request.status in _KEPT:
            self._keep(request)

    def _keep(self, request: Any) -> None:
        """Close a request's open row under the tokens that it holds, for the next turn.

        Once the prompt is complete it holds all tokens that were computed, those of a step in flight
        too. Where nobody knows the last of them yet, the row has no name.
        """
        name, end = request.request_id, request.num_computed_tokens
        running = self._running.get(name)
        if (
            running is None
            or running.failed
            or end != running.num_tokens
            or end < running.prompt_len
            or end == running.start
            or end > len(request.all_token_ids)
        ):
            return
        maker, report = (name, running.epoch), running.report
        row = Row(running.slot, running.start, end, running.thresholds, running.blocks, maker)
        running.blocks, running.slot = [], -1
        self.store.add(row, running.chain, self._prefix(running))
        if report is not None and report.num_tokens == end:
            self.store.settle(row, max(1, self._bounds.blocks(report.num_pages)))
        elif self.store.is_found(row):
            self.store.awaits_report(row)
        self.store.leave([row])

    def _prefix(self, running: Running) -> Prefix | None:
        """By what a request's rows are found; None if rows were reset since it began."""
        if running.num_resets != self.store.num_resets:
            return None
        return self._hits.prefix(running.request, running.thresholds)

    def _goes_on(self, request_id: str) -> bool:
        """Whether a request waits that was computed in part: more of its prompt has come (sessions)."""
        request = self._requests.get(request_id)
        return (
            request is not None
            and request.status != RequestStatus.RUNNING
            and request.num_computed_tokens > 0
        )

    def _restart(self, request_id: str) -> None:
        """Have a request go on from closed rows only.

        What is stored was decided without the tokens that have come, and some of it is dropped, so they
        cannot be added to it. vLLM asks for the request's admission anew, as after a preemption.
        """
        request = self._requests[request_id]
        self._keep(request)
        request.num_computed_tokens = 0
        self._free_all(request_id)
        self._restarted.add(request_id)

    def _free_all(self, request_id: str) -> None:
        """Free what a request holds, in the caches of all layers."""
        self.free(request_id)

    # prefix caching

    def find_longest_cache_hit(
        self, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[Any], ...], int]:
        """Tokens that closed rows hold of a request. vLLM gets no blocks with them: rows own theirs."""
        return ([],), self._hits.look_up(block_hashes, max_length)

    def waits_for_rows(self, request: Any) -> bool:
        """Whether a running request is about to compute the next row of one that waits."""
        return self._hits.is_coming(request, self._running.values())

    def add_local_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Rows that were found are used when the request gets its first blocks."""

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Rows are kept as they are closed."""

    # blocks

    def _as_running(self, request_id: str, num_computed: int) -> Running:
        """The request, or what it would be if it were admitted now."""
        running = self._running.get(request_id)
        if running is not None:
            return running
        request = self._requests[request_id]
        chain = self._hits.found(request_id) if num_computed else []
        assert num_computed == (chain[-1].end if chain else 0), (
            f"vLLM has found {num_computed} tokens of {request_id}, rows hold another number"
        )
        ends = self._hits.ends(request)
        return Running(request, self._read(request), ends, 0, -1, chain, num_computed, num_computed)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Blocks that must be free for the request to grow to `num_tokens` tokens, or to be admitted.

        Those of idle rows that it found are among them. More than there are where it has to wait: slots
        are short, a running request waits for blocks, or a session goes on and is restarted first.
        """
        never = int(self.block_pool.num_gpu_blocks)
        if self._goes_on(request_id):
            self._restart(request_id)
            return never
        runs = request_id in self._running
        if self._is_starved and not runs:
            return never
        running = self._as_running(request_id, total_computed_tokens)
        if running.is_paid(num_tokens) or running.failed:
            return 0
        idle = [row for row in running.chain if not row.users]
        num_idle = sum(len(row.blocks) for row in idle)
        if apply_admission_cap:
            most = self._scheduler_config.max_num_batched_tokens
            wanted = num_idle + self._bounds.expected(running, self._sizes, most)
            wanted += sum(map(self._bounds.promised, self._running.values()))
            return min(wanted, self.num_usable)
        need = self._bounds.step(running, num_tokens)
        wanted, free = num_idle + need.missing(running), self.block_pool.get_num_free_blocks()
        slots = self.store.num_takeable - len(idle)
        if need.slots(running) <= slots and wanted <= free:
            return wanted
        if self._is_too_large(running, need) and (runs or slots):
            # `allocate_new_blocks` comes to the same conclusion, and takes no more than an id
            return num_idle + (not runs)
        self._is_starved |= runs
        return never

    def _is_too_large(self, running: Running, need: Need) -> bool:
        """Whether a step asks for more than the whole pool has, once all pages are known."""
        chain = sum(len(row.blocks) for row in running.chain)
        blocks = chain + len(running.blocks) + need.missing(running)
        num_rows = 1 + len(running.chain) + len(need.rows)
        is_more = blocks > self.num_usable or num_rows > self.shape.num_slots
        return is_more and running.is_settled

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Pay for a step; the worker is only ever told of the one block that is the request's id."""
        running = self._running.get(request_id)
        if running is not None and running.is_paid(num_tokens):
            running.num_tokens = num_tokens
            return []
        new_ids: list[Any] = []
        if running is None:
            running = self._start(request_id)
            new_ids = running.blocks[:1]
        if not running.failed:
            need = self._bounds.step(running, num_tokens)
            missing = need.missing(running)
            slots, free = need.slots(running), self.block_pool.get_num_free_blocks()
            if missing > free or slots > self.store.num_takeable:
                self._fail(running, num_tokens)
            else:
                self._pay(running, need, missing, num_tokens)
        running.num_tokens = num_tokens
        return new_ids

    def _start(self, request_id: str) -> Running:
        """Admit a request, or resume it: all tokens it has now are its prompt."""
        found = self._hits.take(request_id)
        running = self._as_running(request_id, 0)
        running.chain, running.start = found, found[-1].end if found else 0
        running.num_tokens = running.start
        self.store.use(found)
        running.slot = self.store.take_slot()
        self._num_epochs += 1
        running.epoch, running.num_resets = self._num_epochs, self.store.num_resets
        running.blocks = self.block_pool.get_new_blocks(1)
        self._running[request_id] = running
        self.req_to_blocks[request_id] = running.blocks[:1]
        self.num_cached_block[request_id] = 0
        self._started.append(
            Started(
                request_id,
                running.blocks[0].block_id,
                running.slot,
                tuple(row.slot for row in found),
                (0, *(row.end for row in found)),
                running.prompt_len,
                running.ends.message,
                running.thresholds,
                running.epoch,
            )
        )
        return running

    def _pay(self, running: Running, need: Need, missing: int, num_tokens: int) -> None:
        """Take the blocks and slots of a step. Rows that it closes are found from now on.

        Who finds one may start with the same step: a layer of it closes them first.
        """
        blocks = running.blocks
        blocks.extend(self.block_pool.get_new_blocks(missing) if missing else ())
        maker = running.request.request_id, running.epoch
        prefix = self._prefix(running) if need.rows else None
        for (start, end), count in zip(need.rows, need.row_blocks, strict=True):
            taken = blocks[len(blocks) - count :]
            del blocks[len(blocks) - count :]
            row = Row(self.store.take_slot(), start, end, running.thresholds, taken, maker)
            self.store.add(row, [*running.chain, *running.closing], prefix)
            running.closing.append(row)
            running.start = end
        if running.closing:
            self._closing[maker[0]] = running
        if running.num_tokens < running.prompt_len:
            running.in_flight.append((num_tokens, need.open_blocks))

    def _fail(self, running: Running, num_tokens: int) -> None:
        """Let a request's step pass without blocks."""
        self.failures.add(running, num_tokens, self.num_usable * self.shape.num_layers)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """The request leaves, for good or until it is resumed: its open row is gone."""
        running = self._running.pop(request_id, None)
        self._closing.pop(request_id, None)
        super().pop_blocks_for_free(request_id)
        if running is None:
            return []
        for row in reversed(running.closing):
            running.blocks.extend(row.blocks)
            self.store.withdraw(row)
        self.store.leave(running.chain)
        if running.slot >= 0:
            self.store.release_slot(running.slot)
        self.failures.leave(running)
        return running.blocks

    # steps

    def take_started(self) -> list[Started]:
        """Requests that start with the step that was just scheduled."""
        started, self._started = self._started, []
        return started

    def take_restarted(self) -> set[str]:
        """Requests that are computed anew, since this was last asked: their pages are to be released."""
        restarted, self._restarted = self._restarted, set()
        return restarted

    def close_rows(self) -> dict[str, tuple[int, ...]]:
        """The step is scheduled: slots of the rows that it closes."""
        self._is_starved = False
        self.failures.on_message()
        closing = {}
        for name, running in self._closing.items():
            closing[name] = tuple(row.slot for row in running.closing)
            running.chain += running.closing
            running.closing = []
        self._closing = {}
        return closing

    def awaits_reports(self) -> bool:
        """Whether reports are to come that give blocks back."""
        return any(running.in_flight for running in self._running.values())

    def on_report(self, request_id: str, report: PagesHeld) -> None:
        """Take a worker's report: return the blocks that are not needed for what it says is held."""
        self.failures.on_report(request_id, report)
        for slot, num_pages in report.closed.items():
            row = self.store.at(slot)
            if row is not None and row.maker == (request_id, report.epoch):
                self._sizes.observe(row.thresholds, row.end - row.start, num_pages)
                self.store.settle(row, max(1, self._bounds.blocks(num_pages)))
        running = self._running.get(request_id)
        if running is None or running.epoch != report.epoch:
            left = self.store.last_of(request_id)
            if left is not None and left.maker == (request_id, report.epoch):
                if left.end == report.num_tokens:
                    self.store.settle(left, max(1, self._bounds.blocks(report.num_pages)))
            return
        if running.failed:
            return
        running.report = report
        while running.in_flight and running.in_flight[0][0] <= report.num_tokens:
            running.in_flight.popleft()
        if report.num_tokens == running.prompt_len and (rest := running.prompt_len - running.start):
            self._sizes.observe(running.thresholds, rest, report.num_pages)
        horizon = self._bounds.horizon(running)
        surplus = len(running.blocks) - self._bounds.held(running, horizon)
        if surplus > 0:
            self.block_pool.free_blocks(running.blocks[-surplus:])
            del running.blocks[-surplus:]
        running.paid_until = horizon if surplus >= 0 else 0
