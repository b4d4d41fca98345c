"""vLLM's real scheduler with our manager of blocks, and workers that are played: pages are numbers.

The workers do what messages say, in their order, hold as many pages as dice say, and believe nothing:
they check that rows are there, hold the right tokens, and that no step needs more pages than there are.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from conftest import MODEL
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from diffkv.layout import PageLayout
from diffkv.policy import Thresholds
from diffkv.quant import QuantConfig
from diffkv.segments import RowEnds
from diffkv.vllm_plugin import engine_args
from diffkv.vllm_plugin.messages import (
    MAX_IN_FLIGHT,
    PagesHeld,
    ReportMessage,
    Started,
    StepMessage,
)
from diffkv.vllm_plugin.scheduler.manager import DiffKVManager
from diffkv.vllm_plugin.spec import DiffKVSpec, DividedSpec

LAYERS, KV_HEADS, RANKS = 2, 2, 2
HEADS = LAYERS * KV_HEADS
BLOCK, SEGMENT = 16, 64
MESSAGE_END = 2  # the model's end-of-sequence token
MODEL_LEN, MAX_RUNNING = 512, 8
WINDOW = 48
LAYOUT = PageLayout.derive(QuantConfig.parse("k8v4-k4v2"), 8, 256, 4)
EXACT = LAYOUT.exact()


@dataclass
class Stored:
    """A row on the workers.

    Attributes:
        pages: [RANKS, LAYERS] int64.
        tokens: of a closed row; None while it is open.
        start: first token.
        salt: of the request that made it.
        thresholds: likewise.
    """

    pages: np.ndarray
    start: int
    salt: str | None
    thresholds: Thresholds
    tokens: tuple[int, ...] | None = None


@dataclass
class Job:
    """A running request on the workers."""

    start: Started
    chain: list[int]
    tokens: list[int]
    computed: int
    salt: str | None


@dataclass
class Workers:
    """All ranks.

    Attributes:
        num_pages: of the pool.
        num_slots: likewise.
        rng: dice.
        worst: chance that a row takes as many pages as it can, and that a generated token takes one.
        late: whether a step's reports come with the next one.
        rows: by slot.
        jobs: by vLLM's name.
        in_step: requests that started from rows of the same step.
    """

    num_pages: int
    num_slots: int
    rng: np.random.Generator
    worst: float
    late: bool = False
    rows: dict[int, Stored] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    hits: int = 0
    rows_closed: int = 0
    rows_kept: int = 0
    failures: int = 0
    in_step: int = 0
    _withheld: deque[dict[str, PagesHeld]] = field(default_factory=deque)
    _unchecked: list[str] = field(default_factory=list)

    def roll(self, num_tokens: int) -> np.ndarray:
        """Pages of a row, decided."""
        if not num_tokens:
            return np.zeros((RANKS, LAYERS), dtype=np.int64)
        most = KV_HEADS * LAYOUT.max_pages(num_tokens)
        least = max(KV_HEADS, most // 4)
        dice = self.rng.integers(least, most + 1, (RANKS, LAYERS))
        return np.full_like(dice, most) if self.rng.random() < self.worst else dice

    def before(self, message: StepMessage, known: dict[str, tuple[list[int], str | None]]) -> None:
        """The message up to `closing`."""
        assert len(set(message.released)) == len(message.released)
        closed = {}
        for name in message.ended:
            job = self.jobs.pop(name, None)
            if job is not None and job.start.slot not in message.released:
                closed[job.start.slot] = tuple(
                    job.tokens[self.rows[job.start.slot].start : job.computed]
                )
        for slot in message.released:
            self.rows.pop(slot, None)
        for slot, tokens in closed.items():
            assert tokens, "an empty row is kept"
            self.rows[slot].tokens = tokens
            self.rows_kept += 1
        for start in message.started:
            assert start.slot not in self.rows, f"slot {start.slot} is not empty"
            tokens, salt = known[start.request_id]
            self.hits += bool(start.chain)
            self.in_step += not self.rows.keys() >= set(start.chain)
            self._unchecked.append(start.request_id)
            pages = np.zeros((RANKS, LAYERS), dtype=np.int64)
            self.rows[start.slot] = Stored(pages, start.starts[-1], salt, start.thresholds)
            self.jobs[start.request_id] = Job(
                start, list(start.chain), tokens, start.starts[-1], salt
            )
        for job in self.jobs.values():
            assert self.rows[job.start.slot].tokens is None, "an open row is closed"

    def _check_chain(self, start: Started, tokens: list[int], salt: str | None) -> None:
        """What a request goes on from, once the step is done: some of it may be of the same step."""
        end = 0
        for slot in start.chain:
            row = self.rows[slot]
            assert row.tokens is not None and row.start == end, "rows do not follow each other"
            end += len(row.tokens)
            assert list(row.tokens) == tokens[row.start : end], "a hit has other tokens"
            assert (row.salt, row.thresholds) == (salt, start.thresholds)
        assert end == start.starts[-1] < start.prompt_len == len(tokens)

    def run(self, message: StepMessage) -> tuple[dict[str, list[int]], KVConnectorOutput]:
        """The step: what each request samples, and what the workers report."""
        sampled: dict[str, list[int]] = {}
        reports: dict[str, PagesHeld] = {}
        peak = np.zeros((RANKS, LAYERS), dtype=np.int64)
        after = {name: self._store(name, n, message) for name, n in message.num_tokens.items()}
        for row in self.rows.values():
            peak += row.pages
        # a layer at a time: those before it hold what they hold after the step
        totals = np.zeros((RANKS, LAYERS + 1), dtype=np.int64)
        delta, rise = np.zeros_like(peak), np.zeros_like(peak)
        for name, rows in after.items():
            old = self.rows[self.jobs[name].start.slot].pages
            change = sum((row.pages for row in rows.values()), np.zeros_like(old)) - old
            delta += change
            rise += change.clip(min=0)
        for layer in range(LAYERS):
            done = peak.sum(1) + delta[:, :layer].sum(1)
            totals[:, layer] = done + rise[:, layer]
        assert (totals <= self.num_pages).all(), (
            f"overrun: {totals.max()} of {self.num_pages} pages"
        )
        for name, rows in after.items():
            self.rows.update(rows)
            reports[name] = self._report(name, message)
            job = self.jobs[name]
            if name not in message.failed and job.computed < job.start.prompt_len:
                sampled[name] = []
                continue
            token = int(self.rng.integers(1, 4))
            if job.computed == len(job.tokens):
                job.tokens.append(token)
            sampled[name] = [token]
        for name in self._unchecked:
            job = self.jobs[name]
            self._check_chain(job.start, job.tokens[: job.start.prompt_len], job.salt)
        self._unchecked = []
        for job in self.jobs.values():
            assert all(self.rows[slot].tokens is not None for slot in job.chain)
        invalid = {self.jobs[name].start.block_id for name in message.failed}
        self.failures += len(invalid)
        output = KVConnectorOutput(
            invalid_block_ids=invalid, kv_connector_worker_meta=ReportMessage(self._give(reports))
        )
        return sampled, output

    def _give(self, reports: dict[str, PagesHeld]) -> dict[str, PagesHeld]:
        """The reports that are due: where they come late, those of the step before."""
        self._withheld.append(reports)
        due: dict[str, PagesHeld] = {}
        while len(self._withheld) > (self.late and bool(self.jobs)):
            due |= self._withheld.popleft()
        return due

    def _store(self, name: str, num_tokens: int, message: StepMessage) -> dict[int, Stored]:
        """The rows of a request after a step."""
        job = self.jobs[name]
        open_row = self.rows[job.start.slot]
        first, job.computed = job.computed, num_tokens
        if name in message.failed:
            assert name not in message.closing
            return {job.start.slot: open_row}
        assert num_tokens <= len(job.tokens), "a token is computed that nobody knows"
        prompt_len, begin = job.start.prompt_len, open_row.start
        slots = message.closing.get(name, ())
        rows = {}
        if first < prompt_len:
            row_ends = RowEnds(SEGMENT, prompt_len, job.start.message, job.start.thresholds.drops)
            parts = row_ends.cuts(begin, first, min(num_tokens, prompt_len))
            ends = [end for _, end, is_complete in parts if is_complete]
            for slot, end in zip(slots, ends, strict=True):
                assert slot not in self.rows, f"slot {slot} is not empty"
                tokens = tuple(job.tokens[begin:end])
                pages = self.roll(end - begin)
                rows[slot] = Stored(pages, begin, job.salt, job.start.thresholds, tokens)
                job.chain.append(slot)
                begin = end
            self.rows_closed += len(rows)
            if num_tokens < prompt_len:
                waiting = KV_HEADS * EXACT.max_pages(num_tokens - begin)
                pages = np.full((RANKS, LAYERS), waiting)
            else:
                pages = self.roll(num_tokens - begin)
        else:
            assert not slots, "generated tokens close no row"
            grown = open_row.pages + self.rng.binomial(
                KV_HEADS, max(0.2, self.worst), (RANKS, LAYERS)
            )
            pages = np.minimum(grown, KV_HEADS * LAYOUT.max_pages(num_tokens - begin))
        rows[job.start.slot] = Stored(pages, begin, job.salt, job.start.thresholds)
        return rows

    def _report(self, name: str, message: StepMessage) -> PagesHeld:
        job, ranks = self.jobs[name], []
        for rank in range(RANKS):
            held = int(self.rows[job.start.slot].pages[rank].sum())
            closed = {
                slot: int(self.rows[slot].pages[rank].sum())
                for slot in message.closing.get(name, ())
            }
            growth = tuple(HEADS * n for n in range(1, MAX_IN_FLIGHT + 1))
            ranks.append(PagesHeld(held, growth, job.computed, job.start.epoch, closed))
        return ranks[0].fullest(ranks[1])


def _kv_cache_config(config: Any, num_blocks: int, windows: int) -> KVCacheConfig:
    """That of DiffKV's layers, and of layers with a window if there are any."""
    kind: Any = {"block_size": BLOCK, "num_kv_heads": KV_HEADS, "head_size": 8}
    base = FullAttentionSpec(**kind, dtype=torch.float32)
    length = config.model_config.max_model_len
    sizes = LAYOUT, LAYERS, length, MAX_RUNNING, SEGMENT
    names = [f"full{i}" for i in range(LAYERS)]
    if not windows:
        groups = [KVCacheGroupSpec(names, DiffKVSpec.of(base, *sizes))]
        return KVCacheConfig(num_blocks, [], groups)
    window = SlidingWindowSpec(**kind, dtype=torch.float32, sliding_window=WINDOW)
    specs: dict[str, Any] = dict.fromkeys(names, DividedSpec.of(base, *sizes))
    specs |= {f"window{i}": window for i in range(windows)}
    config.cache_config.kv_cache_layout = "LBHNC"
    groups = get_kv_cache_groups(config, specs)
    return get_kv_cache_config_from_groups(
        config, groups, num_blocks * LAYERS * base.page_size_bytes
    )


class World:
    """An engine without a model.

    Args:
        seed: of all dice.
        overlap: whether steps overlap (asynchronous scheduling).
        num_blocks: vLLM's blocks.
        windows: layers that keep vLLM's cache, beside `LAYERS` that have DiffKV's.
        worst: see `Workers`.
        model_len: tokens of the longest request.
        late: whether a step's reports come with the next one.
        options: of the engine's configuration.
    """

    def __init__(
        self,
        seed: int,
        overlap: bool,
        num_blocks: int,
        worst: float = 0.1,
        model_len: int = MODEL_LEN,
        windows: int = 0,
        late: bool = False,
        **options: Any,
    ) -> None:
        args = engine_args("k8v4-k4v2", drops=True)
        args["kv_transfer_config"] = KVTransferConfig(**args["kv_transfer_config"])
        args |= {
            "enable_prefix_caching": True,
            "max_num_batched_tokens": 160,
            "watermark": 0.0,
            **options,
        }
        config = EngineArgs(
            MODEL, dtype="float32", max_model_len=model_len, max_num_seqs=MAX_RUNNING,
            async_scheduling=overlap, block_size=BLOCK, **args,
        ).create_engine_config()  # fmt: skip
        config.cache_config.num_gpu_blocks = num_blocks
        config.cache_config.block_size = BLOCK
        config.cache_config.kv_cache_size_tokens = 5003
        self.scheduler = (AsyncScheduler if overlap else Scheduler)(
            vllm_config=config,
            kv_cache_config=_kv_cache_config(config, num_blocks, windows),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        (self.manager,) = (each for each in managers if isinstance(each, DiffKVManager))
        self.rng = np.random.default_rng(seed)
        shape = self.manager.shape
        self.workers = Workers(shape.num_pages, shape.num_slots, self.rng, worst, late)
        self.overlap = overlap
        self.in_flight: deque[tuple[Any, dict[str, tuple[list[int], str | None]]]] = deque()
        self.num_added = self.queries = self.cached = self.preemptions = 0
        self.ends: dict[str, Any] = {}
        self.ended_tokens: list[list[int]] = []

    def add(self, tokens: list[int], max_tokens: int, **settings: Any) -> str:
        """Add a request; settings are `salt`, `priority`, and those of SamplingParams."""
        name, self.num_added = f"r{self.num_added}", self.num_added + 1
        salt, priority = settings.pop("salt", None), settings.pop("priority", 0)
        params = SamplingParams(max_tokens=max_tokens, temperature=0, **settings)
        params.update_from_generation_config({}, 0)
        request = Request(
            name,
            tokens,
            params,
            None,
            cache_salt=salt,
            priority=priority,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        return name

    def step(self) -> None:
        """One step of the engine: schedule, and have the workers do the oldest step."""
        output = self.scheduler.schedule()
        message = output.kv_connector_metadata
        self.preemptions += len(output.preempted_req_ids or ())
        known = {}
        for start in message.started:
            request = self.scheduler.requests[start.request_id]
            known[start.request_id] = (list(request.all_token_ids), request.cache_salt)
        self.in_flight.append((output, known))
        if not self.overlap or len(self.in_flight) > 1 or not output.num_scheduled_tokens:
            self.finish_step()

    def finish_step(self) -> None:
        """The workers do the oldest step, and the scheduler hears of it."""
        output, known = self.in_flight.popleft()
        message = output.kv_connector_metadata
        self.workers.before(message, known)
        sampled, connector_output = self.workers.run(message)
        names = list(output.num_scheduled_tokens)
        made = ModelRunnerOutput(
            names,
            {name: i for i, name in enumerate(names)},
            [sampled[name] for name in names],
            kv_connector_output=connector_output,
        )
        before = dict(self.scheduler.requests)
        outputs = self.scheduler.update_from_output(output, made)
        for of_client in outputs.values():
            stats = of_client.scheduler_stats
            if stats is not None:
                self.queries += stats.prefix_cache_stats.queries
                self.cached += stats.prefix_cache_stats.hits
            for one in of_client.outputs:
                if one.finish_reason is not None:
                    self.ends[one.request_id] = one.finish_reason
                    self.ended_tokens.append(list(before[one.request_id].all_token_ids))

    def drain(self, most_steps: int = 20000) -> None:
        """Step until no request is left, and the workers have heard of the last one."""
        for _ in range(most_steps):
            if not self.scheduler.requests:
                self.step()
                break
            self.step()
            self.check()
        else:
            raise AssertionError("no progress")
        while self.in_flight:
            self.finish_step()
        self.check()

    def check(self) -> None:
        """Raise AssertionError if blocks, slots, users or pages do not add up."""
        manager, pool = self.manager, self.manager.block_pool
        store, running = manager.store, manager._running
        store.check()
        rows = {id(row): row for row in store._rows.values()}
        users = dict.fromkeys(rows, 0)
        for one in running.values():
            for row in one.chain:
                users[id(row)] += 1
        assert all(row.users == users[key] for key, row in rows.items())
        owned = [block for one in running.values() for block in one.blocks]
        owned += [block for row in rows.values() if row.users for block in row.blocks]
        deferred = [
            block
            for _, blocks in self.scheduler.deferred_frees
            for block in blocks
            if block.pool is pool
        ]
        used = [block.block_id for block in (*owned, *deferred)]
        assert len(used) == len(set(used)), "a block is owned twice"
        num_used = len(used) + manager.failures.num_kept
        assert num_used + pool.get_num_free_blocks() == manager.num_usable
        idle = [block for row in rows.values() if not row.users for block in row.blocks]
        assert all(block.ref_cnt == 0 for block in idle)
        assert len({block.block_id for block in idle}) == len(idle) <= pool.get_num_free_blocks()
        slots = [one.slot for one in running.values()] + list(store._rows) + store._free_slots
        assert sorted(slots) == list(range(manager.shape.num_slots))
        if not self.overlap:
            self._check_pages(running, rows)

    def _check_pages(self, running: dict[str, Any], rows: dict[int, Any]) -> None:
        """Whatever is held is paid for, each by itself."""
        for row in rows.values():
            held = self.workers.rows[row.slot].pages.sum(1).max()
            assert held <= len(row.blocks) * LAYERS, (held, row)
        for one in running.values():
            if not one.failed:
                held = self.workers.rows[one.slot].pages.sum(1).max()
                assert held <= len(one.blocks) * LAYERS, (held, one)
