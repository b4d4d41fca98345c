"""The worker's side: which request is in which slot, what a step adds, what to report.

One per worker process, owned by the worker's connector. It knows vLLM's data, not its engine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkv import ops, pool
from diffkv.cache import DiffKVCache, PromptChunk, Step
from diffkv.policy import Thresholds
from diffkv.rotation import signs_of
from diffkv.vllm_plugin.metrics import DiffKVStats
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.scheduler.spec import DiffKVSpec, Report
from diffkv.vllm_plugin.worker.accounting import Accounts, Request
from diffkv.vllm_plugin.worker.prefill import choose_prefill
from diffkv.vllm_plugin.worker.snapshot import Snapshot, Snapshots, Subject

__all__ = ["Rows", "Started", "WorkerCache"]


@dataclass(frozen=True)
class Started:
    """A request that the scheduler admits, or resumes after a preemption.

    Attributes:
        request_id: vLLM's.
        block_id: of the block that is the request's identity in block tables.
        prompt_len: tokens that are prefilled; after a preemption generated ones are among them.
        thresholds: of the request.
        life: which admission of the request this is; reports of an earlier one may still come.
        max_pages: that the prompt may take on this rank; None: as many as it needs.
    """

    request_id: str
    block_id: int
    prompt_len: int
    thresholds: Thresholds
    life: int
    max_pages: int | None = None


@dataclass
class Rows:
    """What vLLM says of a step's rows; with the scheduler's message it makes the plan of the step.

    Attributes:
        block_ids: [num_rows] int32, the block that identifies each row's request; 0 for padding.
        query_starts: [num_rows + 1] int, where each row's tokens start in the packed batch.
        seq_lens: [num_rows] int32, tokens of each request after the step.
        step: as planned; None before.
    """

    block_ids: Tensor
    query_starts: np.ndarray
    seq_lens: Tensor
    step: Step | None = None


@dataclass
class _Slots:
    """Host-side tables of the running requests."""

    free: list[int]
    of_block: Tensor
    prompt_lens: np.ndarray
    requests: dict[str, Request] = field(default_factory=dict)


class WorkerCache:
    """The pool of one worker.

    Args:
        options: of the engine.
        spec: of the cache, as vLLM merged it.
        num_blocks: vLLM's blocks.
        buffer: [num_bytes] int8, the one allocation behind all layers' caches.
        scale: of the attention's dot products.
        late: report a step after the next one, so that the host does not wait for the device.
    """

    def __init__(
        self,
        options: Options,
        spec: DiffKVSpec,
        num_blocks: int,
        buffer: Tensor,
        scale: float,
        late: bool = False,
    ) -> None:
        self.spec = spec
        self.shape = spec.pool_shape(num_blocks)
        self.state = pool.create(self.shape, buffer, spec.dtype, options.window)
        if buffer.device.type == "cpu":
            self.state.pages.zero_()  # a host that lacks the memory must say so now
        kernels = ops.load(buffer.device.type, options.kernels)
        signs = signs_of(options.rotation(), spec.head_size, buffer.device)
        prefill = choose_prefill(buffer.device.type, spec.dtype, spec.head_size)
        self.cache = DiffKVCache(
            self.state, kernels, scale, options.prompt_policy(), prefill, signs
        )
        self.accounts = Accounts(self.shape, self.state)
        self._slots = _Slots(
            list(range(self.shape.num_slots))[::-1],
            torch.full((num_blocks,), -1, dtype=torch.int32, device=buffer.device),
            np.zeros(self.shape.num_slots + 1, dtype=np.int64),
        )
        self._snapshots = Snapshots(self.state, late)
        self._due: list[Snapshot] = []
        self._is_reported = False
        self._scheduled: dict[str, Request] = {}
        self._awaiting: Rows | None = None
        self._row_slots: list[Tensor] = []

    def before_step(
        self, ended: Iterable[str], started: Iterable[Started], num_tokens: Mapping[str, int]
    ) -> None:
        """Release the requests that ended, then open slots for those that start.

        Args:
            ended: finished or preempted requests; unknown ones are ignored.
            started: new or resumed requests.
            num_tokens: tokens of each scheduled request after the step.
        """
        with self.accounts.managing():
            self._end(ended)
            self._start(started)
        self._scheduled = {}
        for name, count in num_tokens.items():
            request = self._slots.requests[name]
            request.num_tokens = count
            self._scheduled[name] = request
        self._is_reported = False
        self.accounts.step_began(len(self._slots.requests))
        if self._awaiting is not None:
            self.plan(self._awaiting)

    def _end(self, ended: Iterable[str]) -> None:
        slots = []
        for request_id in ended:
            request = self._slots.requests.pop(request_id, None)
            if request is not None:
                self.accounts.request_ended(request)
                self._slots.of_block[request.block_id] = -1
                slots.append(request.slot)
        self.cache.close(slots)
        self._slots.free.extend(slots)

    def _start(self, started: Iterable[Started]) -> None:
        for start in started:
            slot = self._slots.free.pop()
            self.cache.open(slot, start.prompt_len, start.thresholds, start.max_pages)
            self._slots.of_block[start.block_id] = slot
            self._slots.prompt_lens[slot] = start.prompt_len
            request = Request(slot, start.block_id, start.prompt_len, start.life)
            self._slots.requests[start.request_id] = request

    def plan_after_message(self, rows: Rows) -> None:
        """Plan a step in `before_step`, which comes after its rows are known."""
        self._awaiting = rows

    def plan(self, rows: Rows) -> Step:
        """Sort the rows of a step into prompts and generated tokens, and plan the latter.

        A step without prompts is planned from device tensors alone: the host waits for nothing.
        """
        self._awaiting = None
        slots, seq_lens = self._slots_of(rows.block_ids), rows.seq_lens
        prompts: list[PromptChunk] = []
        generated_rows: slice | Tensor = slice(0, len(slots))
        if any(request.is_prompt for request in self._scheduled.values()):
            prompts, generated, generated_rows = self._split(slots, rows.query_starts, seq_lens)
            slots, seq_lens = slots[generated], seq_lens[generated]
        with self.accounts.managing():
            step = self.cache.plan(prompts, generated_rows, slots, seq_lens.int())
        if step.decode is not None:
            self._snapshots.count_demotions(step.decode.places)
        self.accounts.step_planned(sum(map(self.cache.compresses, prompts)))
        rows.step = step
        return step

    def _slots_of(self, block_ids: Tensor) -> Tensor:
        """[num_rows] int32 at an address that stays: a CUDA graph of a step reads it again."""
        num = len(block_ids)
        if not self._row_slots or len(self._row_slots[-1]) < num:
            # a shorter one may be part of a graph, and is kept
            self._row_slots.append(torch.empty(num, dtype=torch.int32, device=block_ids.device))
        slots = self._row_slots[-1][:num]
        return torch.index_select(self._slots.of_block, 0, block_ids, out=slots)

    def _split(
        self, row_slots: Tensor, query_starts: np.ndarray, seq_lens: Tensor
    ) -> tuple[list[PromptChunk], Tensor, slice | Tensor]:
        """Prompt chunks; which rows are generated tokens; and where those are in the batch."""
        slots, lengths = row_slots.cpu().numpy(), seq_lens.cpu().numpy()
        num_new = np.diff(query_starts)
        used = (slots >= 0) & (num_new > 0)
        generated = used & (lengths > self._slots.prompt_lens[slots])
        prompts = []
        for row in np.nonzero(used & ~generated)[0].tolist():
            span = slice(int(query_starts[row]), int(query_starts[row + 1]))
            slot, num_stored = int(slots[row]), int(lengths[row] - num_new[row])
            prompts.append(PromptChunk(slot, span, num_stored, int(self._slots.prompt_lens[slot])))
        rows = np.nonzero(generated)[0]
        assert (num_new[rows] == 1).all(), "a request cannot generate several tokens in a step"
        starts = query_starts[:-1][rows].astype(np.int64)
        index = torch.from_numpy(rows).to(row_slots.device)
        if len(rows) == 0 or starts[-1] == len(rows) - 1:
            return prompts, index, slice(0, len(rows))
        return prompts, index, torch.from_numpy(starts).to(row_slots.device)

    def report(self) -> dict[str, Report]:
        """What each request of a step holds: of the one that just ended, or of the one before.

        Raises:
            RuntimeError: a plan wanted more pages than were free, which quotas rule out.
        """
        with self.accounts.managing():
            self._look()
            reports: dict[str, Report] = {}
            for snapshot in self._due:
                if snapshot.overruns:
                    raise RuntimeError(
                        f"DiffKV's pool was overrun: {snapshot.num_free} of {self.state.num_pages} "
                        f"pages free; please report this"
                    )
                reports |= snapshot.reports()
            self._due = []
            return reports

    def stats(self, rank: int) -> DiffKVStats:
        """Metrics after a step; requests are counted once, by the first rank."""
        self._look()
        counters, ratios = self.accounts.take()
        if rank:
            counters = {name: counters[name] for name in ("demotions", "prompts_given_up")}
            ratios = []
        return DiffKVStats.of_rank(rank, self.accounts.gauges(), counters, ratios)

    def _look(self) -> None:
        """Take the step's snapshot, and note those that are due; once a step, whoever asks first."""
        if self._is_reported:
            return
        self._is_reported = True
        subjects = {
            name: Subject(r.slot, r.life, r.num_tokens, self.cache.over_limit(r.slot))
            for name, r in self._scheduled.items()
        }
        self.accounts.prompts_given_up(sum(s.given_up for s in subjects.values()))
        running = self._slots.requests.values()
        self._snapshots.take(subjects, len(running), sum(r.num_tokens for r in running))
        self._due = self._snapshots.give()
        if self._due:
            self.accounts.step_ended(self._due[-1])

    def summary(self) -> dict[str, Any]:
        """Totals of all requests so far, running ones included, and the pool's shape."""
        return self.accounts.summary(list(self._slots.requests.values()))
