"""Quotas against an adversary: hundreds of prompts whose sizes nobody could expect, on two ranks.

vLLM's scheduler and our worker are played, in the order of their calls; the manager is the real one.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec

from diffkv.layout import PageLayout
from diffkv.policy import Thresholds
from diffkv.quant import QuantConfig
from diffkv.vllm_plugin.messages import MAX_IN_FLIGHT, PagesHeld
from diffkv.vllm_plugin.scheduler.estimate import Prompt, PromptSizes
from diffkv.vllm_plugin.scheduler.manager import DiffKVManager
from diffkv.vllm_plugin.spec import DiffKVSpec

LAYERS, KV_HEADS, RANKS = 2, 2, 2
HEADS = LAYERS * KV_HEADS
MODEL_LEN, BATCHED_TOKENS, MAX_RUNNING = 400, 330, 24
NUM_BLOCKS = 320


@dataclass(eq=False)
class Job:
    """A request, and what it holds on each rank."""

    name: str
    prompt_len: int
    new_tokens: int
    shares: tuple[float, float]
    computed: int = 0
    generated: int = 0
    pages: list[int] = field(default_factory=lambda: [0] * RANKS)
    times_given_up: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + self.generated


class World:
    """One engine: the manager, a scheduler and two ranks of workers."""

    def __init__(self, seed: int) -> None:
        import torch

        import diffkv.vllm_plugin

        diffkv.vllm_plugin.register()
        base = FullAttentionSpec(
            block_size=16, num_kv_heads=KV_HEADS, head_size=8, dtype=torch.float32
        )
        layout = PageLayout.derive(QuantConfig.parse("k8v4-k4v2"), 8, 256, 4)
        spec = DiffKVSpec.of(base, layout, LAYERS, MODEL_LEN, MAX_RUNNING)
        self.blocks = BlockPool(NUM_BLOCKS, False, 16)
        self.manager = DiffKVManager(
            spec,
            block_pool=self.blocks,
            enable_caching=False,
            kv_cache_group_id=0,
            scheduler_block_size=16,
        )
        self.usable = self.blocks.get_num_free_blocks()
        self.layout = layout
        self.rng = np.random.default_rng(seed)
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.preemptions = self.given_up = 0

    def most(self, num_tokens: int) -> int:
        return HEADS * self.layout.max_pages(num_tokens)

    def leave(self, job: Job) -> None:
        """Preempted: blocks are free now, pages when the worker hears of it, before the step."""
        self.blocks.free_blocks(reversed(self.manager.pop_blocks_for_free(job.name)))
        job.computed, job.pages = 0, [0] * RANKS

    def allocate(self, job: Job, num_tokens: int) -> bool:
        needed = self.manager.get_num_blocks_to_allocate(job.name, num_tokens)
        if needed > self.blocks.get_num_free_blocks():
            return False
        self.manager.allocate_new_blocks(job.name, num_tokens)
        if not job.computed:
            self.manager.begin(job.name)
        return True

    def schedule(self) -> tuple[dict[Job, int], list[Job]]:
        """As vLLM: running requests first, preempting from the end; then waiting ones."""
        scheduled: dict[Job, int] = {}
        started: list[Job] = []
        budget, preempted, index = BATCHED_TOKENS, False, 0
        while index < len(self.running) and budget:
            job = self.running[index]
            num = min(job.num_tokens - job.computed, budget)
            fits = self.allocate(job, job.computed + num)
            while not fits:
                victim = self.running.pop()
                newest = victim.name not in self.manager._must_leave
                assert victim.times_given_up or newest
                self.leave(victim)
                self.waiting.insert(0, victim)
                self.preemptions += 1
                preempted = True
                if victim is job:
                    return scheduled, started
                fits = self.allocate(job, job.computed + num)
            scheduled[job] = num
            budget -= num
            index += 1
        while self.waiting and budget and not preempted and len(self.running) < MAX_RUNNING:
            job = self.waiting[0]
            fits_a_step = job.num_tokens <= BATCHED_TOKENS
            prompt = Prompt(job.num_tokens, Thresholds(3, 0)) if fits_a_step else None
            self.manager.expect(job.name, prompt)
            whole = self.manager.get_num_blocks_to_allocate(job.name, job.num_tokens)
            num = min(job.num_tokens, budget)
            if whole > self.blocks.get_num_free_blocks() or not self.allocate(job, num):
                break
            self.running.append(self.waiting.pop(0))
            started.append(job)
            scheduled[job] = num
            budget -= num
        return scheduled, started

    def work(self, scheduled: dict[Job, int], limits: dict[str, int]) -> dict[Job, PagesHeld]:
        """What both ranks hold after the step, and say of it, joined."""
        reports: dict[Job, PagesHeld] = {}
        for job, num in scheduled.items():
            before, job.computed = job.computed, job.computed + num
            for rank in range(RANKS):
                given_up = False
                if job.computed < job.num_tokens:  # a chunk, all high
                    high = self.layout.high.tokens_per_page
                    job.pages[rank] = HEADS * -(-job.computed // high)
                elif num > 1 or before == 0:  # a prompt is complete
                    wanted = max(HEADS, int(job.shares[rank] * self.most(job.computed)))
                    given_up = wanted > limits.get(job.name, wanted)
                    job.pages[rank] = 0 if given_up else wanted
                else:
                    assert job.name not in self.manager._must_leave
                    grown = job.pages[rank] + int(self.rng.binomial(HEADS, 0.1))
                    job.pages[rank] = min(grown, self.most(job.computed))
                growth = tuple(HEADS * n for n in range(1, MAX_IN_FLIGHT + 1))
                epoch = self.manager._epochs[job.name]
                report = PagesHeld(job.pages[rank], growth, job.computed, given_up, epoch)
                reports[job] = report if rank == 0 else reports[job].fullest(report)
        for rank in range(RANKS):
            held = sum(job.pages[rank] for job in self.running)
            assert held <= self.manager.shape.num_pages, "overrun"
        return reports

    def step(self) -> None:
        scheduled, started = self.schedule()
        limits = self.manager.limits([job.name for job in started])
        for job, report in self.work(scheduled, limits).items():
            if job.computed == job.num_tokens:
                job.generated += 1  # also of a prompt that was given up: its attention is exact
            if job.generated > job.new_tokens:
                self.running.remove(job)
                self.manager.forget(job.name)
                self.leave(job)
                continue
            self.manager.on_report(job.name, report)
            self.given_up += report.given_up
            job.times_given_up += report.given_up
            assert job.times_given_up <= 1
        self.check()

    def check(self) -> None:
        held = 0
        for job in self.running:
            quota = self.manager._held(job.name)
            held += quota
            assert quota * LAYERS >= max(job.pages), (job, quota)
        assert held + self.blocks.get_num_free_blocks() == self.usable


def poisoned(rng: np.random.Generator, index: int) -> tuple[float, float]:
    """Eighty prompts that nearly vanish, then ten that cannot be compressed at all on some rank."""
    if index % 90 < 80:
        return 0.1, 0.1
    return tuple(rng.permutation([1.0, rng.choice([0.1, 1.0])]))


def anything(rng: np.random.Generator, index: int) -> tuple[float, float]:
    return tuple(rng.uniform(0.05, 1.0, RANKS))


@pytest.mark.parametrize(
    ("sizes", "lengths", "expects_too_little"),
    [(poisoned, (256, 330), False), (anything, (2, 360), True)],
    ids=["poisoned", "every bet is lost"],
)
def test_no_overrun_no_leak_all_finish(
    monkeypatch: pytest.MonkeyPatch,
    sizes: Any,
    lengths: tuple[int, int],
    expects_too_little: bool,
) -> None:
    if expects_too_little:
        monkeypatch.setattr(PromptSizes, "expected", lambda self, prompt, most: most // 8)
    world = World(seed=0)
    rng = np.random.default_rng(1)
    jobs = [
        Job(f"r{i}", int(rng.integers(*lengths)), int(rng.integers(10, 40)), sizes(rng, i))
        for i in range(450)
    ]
    for i, job in enumerate(jobs):
        world.waiting.append(job)
        if i % 3 == 0:
            world.step()
    steps = 0
    while world.waiting or world.running:
        world.step()
        steps += 1
        assert steps < 20000, "no progress"
    assert all(job.generated == job.new_tokens + 1 for job in jobs)
    assert world.given_up > (10 if expects_too_little else 0)
    assert world.preemptions > world.given_up
    assert world.blocks.get_num_free_blocks() == world.usable
    ours = world.manager
    assert not any((ours._quotas, ours._reports, ours._num_tokens, ours._prompts))
    assert not any((ours._given_up, ours._must_leave, ours._epochs))
