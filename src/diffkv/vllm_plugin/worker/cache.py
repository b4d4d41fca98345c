"""The worker's side of the connector: the slot of each request, the plan of a step, the reports.

There is one in each worker process. It knows vLLM's data, not its engine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.logger import init_logger

from diffkv import ops, pool
from diffkv.cache import DiffKVCache, PromptChunk, Step
from diffkv.quant import ConfigError
from diffkv.rotation import signs_of
from diffkv.uploads import on_device
from diffkv.vllm_plugin.division import Division, group_of
from diffkv.vllm_plugin.messages import PagesHeld, Started, StepMessage
from diffkv.vllm_plugin.metrics import DiffKVStats
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.spec import DiffKVSpec
from diffkv.vllm_plugin.worker.accounting import Accounts
from diffkv.vllm_plugin.worker.prefill import choose_prefill
from diffkv.vllm_plugin.worker.snapshot import Moment, RunningRequest, Snapshot, Snapshots

__all__ = ["BatchRows", "WorkerCache"]

logger = init_logger("vllm.diffkv")


@dataclass(frozen=True)
class BatchRows:
    """A step's rows as vLLM's model runner describes them, a row for each request.

    Attributes:
        block_ids: [num_rows] int32, the block that identifies each row's request; 0 for padding.
        query_starts: [num_rows + 1] int, where each row's tokens start in the packed batch.
        seq_lens: [num_rows] int32, tokens of each request after the step.
    """

    block_ids: Tensor
    query_starts: np.ndarray
    seq_lens: Tensor


@dataclass
class _Rows:
    """The rows that there are, and the running requests.

    Attributes:
        of_block: [num_blocks] int32, slot of the open row of the request that it identifies,
            or -1.
        prompt_lens: [num_slots + 1] int64 on the host; the last is for no slot, -1.
        requests: the requests themselves, by vLLM's name.
        lengths: tokens of each row that is closed, by its slot.
        num_tokens: tokens of all rows, each counted once.
    """

    of_block: Tensor
    prompt_lens: np.ndarray
    requests: dict[str, RunningRequest] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    num_tokens: int = 0


class WorkerCache:
    """The pool of one worker, in the allocation that vLLM made for all layers' caches.

    Args:
        kv_caches: each layer's view of that allocation; several for a layer with a recurrent state.
        options: the engine's.
        vllm_config: vLLM's configuration, which has the layers.
        kv_cache_config: vLLM's KVCacheConfig, with the number of blocks and the layers' spec.
        division: how the KV memory is divided, if not all layers have DiffKV's cache; then the pool has
            an allocation of its own.

    Raises:
        ConfigError: the layers' softmax scales differ.
    """

    def __init__(
        self,
        kv_caches: Mapping[str, Any],
        options: Options,
        vllm_config: Any,
        kv_cache_config: Any,
        division: Division | None = None,
    ) -> None:
        group = group_of(kv_cache_config)
        spec: DiffKVSpec = group.kv_cache_spec
        storage = kv_caches[group.layer_names[0]].untyped_storage()
        device, on_cpu = storage.device, storage.device.type == "cpu"
        layers = vllm_config.compilation_config.static_forward_context
        impls = [layers[name].impl for name in group.layer_names]
        scales = {impl.scale for impl in impls}
        if len(scales) != 1:
            raise ConfigError(f"DiffKV needs one attention scale for all layers, got {scales}")

        if division is None:
            num_bytes = spec.pool_bytes(kv_cache_config.num_blocks)
            buffer = torch.empty(0, dtype=torch.int8, device=device).set_(storage)
        else:
            assert storage.nbytes() == division.blocks_bytes, "vLLM has not kept to its part"
            num_bytes = division.pool_bytes
            buffer = torch.empty(num_bytes, dtype=torch.int8, device=device)
        self.shape = spec.pool_shape(num_bytes, vllm_config.model_config.max_model_len)
        # in warm-up runs the second model runner numbers requests by vLLM's own blocks
        num_ours = 1 + num_bytes // (self.shape.num_layers * self.shape.page_bytes)
        num_blocks = max(num_ours, kv_cache_config.num_blocks)
        self.state = pool.create(self.shape, buffer, spec.dtype, options.window)
        if on_cpu:
            self.state.pages.zero_()  # a host that lacks the memory must say so now
        self.cache = DiffKVCache(
            self.state,
            ops.load(device.type, options.kernels),
            scales.pop(),
            options.prompt_policy(),
            choose_prefill(device.type, spec.dtype, spec.head_size),
            signs_of(options.rotation(), spec.head_size, device),
            self.shape.segment,
        )
        self.accounts = Accounts(self.shape, self.state)
        self._rows = _Rows(
            torch.full((num_blocks,), -1, dtype=torch.int32, device=device),
            np.zeros(self.shape.num_slots + 1, dtype=np.int64),
        )
        # where steps overlap, a report that came at once would wait for the device
        late = not on_cpu and vllm_config.max_concurrent_batches > 1
        self._snapshots = Snapshots(self.cache, late)
        self._due: list[Snapshot] = []
        self._is_reported = False
        self._message = StepMessage()
        self._scheduled: dict[str, RunningRequest] = {}
        self._batch: Sequence[str] = ()
        self._has_prompts = False
        self._ended: list[RunningRequest] = []

        for impl in impls:
            impl.worker = self
        self.cache.warm_up(impls[0].num_heads, vllm_config.scheduler_config.max_num_seqs)

    def before_step(self, message: StepMessage) -> None:
        """Follow the scheduler: release rows, end requests, open rows for those that start.

        An ended request that never started here is ignored.
        """
        with self.accounts.managing():
            self._end(message)
            self._start(message.started)
        rows = self._rows
        self._message, self._scheduled = message, {}
        self._has_prompts = self._is_reported = False
        for name, count in message.num_tokens.items():
            request = self._scheduled[name] = rows.requests[name]
            rows.num_tokens += count - request.num_tokens
            request.num_tokens = count
            self._has_prompts |= count <= request.ends.prompt_len
        for name in message.failed:
            rows.of_block[rows.requests[name].block_id] = -1
        self.accounts.step_began(len(rows.requests))

    def _end(self, message: StepMessage) -> None:
        """Forget requests and release rows; the open rows of requests that are kept are closed now."""
        rows = self._rows
        for request_id in message.ended:
            request = rows.requests.pop(request_id, None)
            if request is not None:
                if request_id not in message.back:
                    self._ended.append(request)
                rows.of_block[request.block_id] = -1
                self.cache.end([request.slot])
                rows.lengths[request.slot] = request.num_tokens - request.start
        self.cache.release(message.released)
        for slot in message.released:
            rows.num_tokens -= rows.lengths.pop(slot, 0)

    def _start(self, started: Iterable[Started]) -> None:
        rows = self._rows
        for start in started:
            slot, prompt_len, chain = start.slot, start.prompt_len, start.chain
            self.cache.open(slot, prompt_len, start.thresholds, chain, start.starts, start.message)
            rows.of_block[start.block_id] = slot
            rows.prompt_lens[slot] = prompt_len
            ends, first = self.cache.ends(slot), start.starts[-1]
            rows.requests[start.request_id] = RunningRequest(
                slot, start.block_id, ends, start.epoch, chain, first, first
            )

    def note_batch(self, names: Sequence[str]) -> None:
        """Whose rows the next batch has, in order; whoever does not know leaves it to the device."""
        self._batch = names

    def load_errors(self) -> set[int]:
        """Blocks of the step's requests that are too large for the whole pool."""
        return {self._scheduled[name].block_id for name in self._message.failed}

    def plan(self, rows: BatchRows) -> Step:
        """Sort the rows of a step into prompts and generated tokens, and plan the latter.

        The host waits for nothing, but where there are prompts and nobody has said whose the rows are. A
        step without prompts is planned from device tensors alone: a CUDA graph can have the plan in it.
        """
        slots, seq_lens = self._rows.of_block.index_select(0, rows.block_ids), rows.seq_lens
        prompts: list[PromptChunk] = []
        passing: list[slice] = []
        generated_rows: slice | Tensor = slice(0, len(slots))
        if self._has_prompts:
            split = self._split(slots, rows.query_starts, seq_lens)
            prompts, generated, generated_rows, passing = split
            self._close(prompts)
            slots, seq_lens = slots[generated], seq_lens[generated]
        with self.accounts.managing():
            step = self.cache.plan(prompts, generated_rows, slots, seq_lens.int(), passing)
        self.accounts.step_planned(sum(map(self.cache.compresses, prompts)))
        return step

    def _close(self, prompts: Sequence[PromptChunk]) -> None:
        """Note the rows that chunks complete, as the cache is about to."""
        requests = {request.slot: request for request in self._scheduled.values()}
        for chunk in prompts:
            request = requests[chunk.slot]
            ends = request.ends.up_to(request.start, chunk.end)
            for slot, end in zip(chunk.closing, ends, strict=True):
                self._rows.lengths[slot] = end - request.start
                request.chain, request.start = (*request.chain, slot), end

    def _split(
        self, row_slots: Tensor, query_starts: np.ndarray, seq_lens: Tensor
    ) -> tuple[list[PromptChunk], Tensor, slice | Tensor, list[slice]]:
        """Prompt chunks; rows of generated tokens, and where those are in the batch; who failed."""
        slots, lengths = self._on_host(row_slots, seq_lens)
        num_new = np.diff(query_starts)
        used = (slots >= 0) & (num_new > 0)
        generated = used & (lengths > self._rows.prompt_lens[slots])
        closing = {
            request.slot: self._message.closing.get(name, ())
            for name, request in self._scheduled.items()
        }
        passing = _spans((slots < 0) & (num_new > 0), query_starts)
        is_prompt = used & ~generated
        prompts = []
        for row, span in zip(
            np.nonzero(is_prompt)[0], _spans(is_prompt, query_starts), strict=True
        ):
            slot, num_stored = int(slots[row]), int(lengths[row] - num_new[row])
            prompt_len = int(self._rows.prompt_lens[slot])
            prompts.append(PromptChunk(slot, span, num_stored, prompt_len, closing[slot]))
        rows = np.nonzero(generated)[0]
        assert (num_new[rows] == 1).all(), "a request cannot generate several tokens in a step"
        starts = query_starts[:-1][rows].astype(np.int64)
        index, places = (on_device(x, torch.int64, row_slots.device) for x in (rows, starts))
        if len(rows) == 0 or starts[-1] == len(rows) - 1:
            return prompts, index, slice(0, len(rows)), passing
        return prompts, index, places, passing

    def _on_host(self, row_slots: Tensor, seq_lens: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Slot of each row, and tokens of its request after the step."""
        batch, self._batch = self._batch, ()
        if not batch:
            return row_slots.cpu().numpy(), seq_lens.cpu().numpy()
        slots, lengths = np.full(len(row_slots), -1), np.zeros(len(row_slots), dtype=np.int64)
        requests = [self._scheduled[name] for name in batch]
        lengths[: len(batch)] = [request.num_tokens for request in requests]
        slots[: len(batch)] = [
            -1 if name in self._message.failed else request.slot
            for name, request in zip(batch, requests, strict=True)
        ]
        return slots, lengths

    def report(self) -> dict[str, PagesHeld]:
        """Each request of the step that just ended, or of the one before it.

        Raises:
            RuntimeError: a plan wanted more pages than were free, which quotas rule out.
        """
        with self.accounts.managing():
            self._look()
            reports: dict[str, PagesHeld] = {}
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
        return DiffKVStats.of_rank(rank, self.accounts.gauges(), *self.accounts.take())

    def _look(self) -> None:
        """Take the step's snapshot, and note those that are due; once a step, whoever asks first."""
        if self._is_reported:
            return
        self._is_reported = True
        problem = self.cache.range_problem()
        if problem is not None:
            logger.warning("DiffKV: %s", problem)
        rows, running = self._rows, len(self._rows.requests)
        ended, self._ended = self._ended, []
        self._snapshots.take(
            Moment(
                self._message,
                self._scheduled,
                ended,
                running,
                running + len(rows.lengths),
                rows.num_tokens,
            )
        )
        self._take_due(self._snapshots.give())

    def _take_due(self, due: Sequence[Snapshot]) -> None:
        for snapshot in due:
            self.accounts.step_ended(snapshot)
        self._due += due

    @property
    def requests(self) -> Mapping[str, RunningRequest]:
        """The running requests, and those that ended with the latest step, by vLLM's name."""
        return self._rows.requests

    def summary(self) -> dict[str, Any]:
        """Totals of all requests so far, running ones included, and the pool's shape."""
        self._take_due(self._snapshots.give(settle=True))
        return self.accounts.summary(list(self._rows.requests.values()))


def _spans(chosen: np.ndarray, query_starts: np.ndarray) -> list[slice]:
    """Where the tokens of some requests of a batch are."""
    starts, ends = query_starts[:-1][chosen], query_starts[1:][chosen]
    return [slice(*each) for each in zip(starts.tolist(), ends.tolist(), strict=True)]
