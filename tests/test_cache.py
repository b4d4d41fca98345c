"""Requests of a cache from their first chunk to their end: kernels and reference keep the same."""

import random

import pytest
import torch

from diffkv import ops, pool
from diffkv.cache import DiffKVCache, PromptChunk
from diffkv.layout import PageLayout
from diffkv.policy import LOW, Thresholds
from diffkv.quant import QuantConfig
from diffkv.shape import PoolShape

NUM_LAYERS, NUM_KV_HEADS, GROUP, HEAD_DIM = 2, 2, 2, 8
NUM_SLOTS, MAX_MODEL_LEN, WINDOW, PAGE_BYTES = 3, 40, 4, 160
NUM_STEPS = 12


class Run:
    """Requests that come, in one step or in chunks, grow and go: the same with any kernels."""

    def __init__(self, quant, seed, kernels, thresholds):
        layout = PageLayout.derive(
            QuantConfig.parse(quant), HEAD_DIM, PAGE_BYTES, 4, thresholds.alpha_low > 0
        )
        heads = (NUM_LAYERS, NUM_KV_HEADS)
        num_pages = 3 * NUM_SLOTS * NUM_LAYERS * NUM_KV_HEADS * layout.max_pages(MAX_MODEL_LEN)
        shape = PoolShape(layout, *heads, NUM_SLOTS, MAX_MODEL_LEN, num_pages)
        buffer = torch.zeros(shape.table_bytes + num_pages * PAGE_BYTES, dtype=torch.uint8)
        self.state = pool.create(shape, buffer, torch.float32, WINDOW)
        self.cache = DiffKVCache(self.state, ops.load("cpu", kernels), HEAD_DIM**-0.5)
        self.thresholds = thresholds
        self.rnd = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.requests = {}  # slot -> (prompt_len, tokens so far)
        self.outputs, self.counts = [], []
        self.num_tokens = 0  # after each step, over all layers and heads: kept at most
        for _ in range(NUM_STEPS):
            self.step()
        self.cache.release(list(self.requests))
        self.requests = {}
        self.check()

    def check(self):
        waiting = [slot for slot, (prompt, n) in self.requests.items() if 0 < n < prompt]
        pool.check_invariants(self.state, waiting)

    def step(self):
        ended = [s for s, (_, n) in self.requests.items() if n > 30 or self.rnd.random() < 0.03]
        self.cache.release(ended)
        for slot in ended:
            del self.requests[slot]
        self.check()
        growing = [slot for slot, (prompt, n) in self.requests.items() if n >= prompt]
        prompts, start = [], len(growing)
        for slot in range(NUM_SLOTS):
            if slot in growing:
                continue
            if slot not in self.requests:
                prompt_len = self.rnd.randint(1, 24)
                self.requests[slot] = (prompt_len, 0)
                self.cache.open(slot, prompt_len, self.thresholds)
            prompt_len, stored = self.requests[slot]
            num = self.rnd.randint(1, prompt_len - stored)
            prompts.append(PromptChunk(slot, slice(start, start + num), stored, prompt_len))
            start += num
            self.requests[slot] = (prompt_len, stored + num)
        for slot in growing:
            self.requests[slot] = (self.requests[slot][0], self.requests[slot][1] + 1)
        lens = torch.tensor([self.requests[s][1] for s in growing], dtype=torch.int32)
        slots = torch.tensor(growing, dtype=torch.int32)
        step = self.cache.plan(prompts, slice(0, len(growing)), slots, lens)
        for layer in range(NUM_LAYERS):
            q, k, v = (
                torch.randn(start, heads, HEAD_DIM, generator=self.generator)
                for heads in (NUM_KV_HEADS * GROUP, NUM_KV_HEADS, NUM_KV_HEADS)
            )
            output = torch.full_like(q, torch.nan)
            self.cache.attend(layer, step, q, k, v, output)
            self.outputs.append(output.flatten())
        self.check()
        self.num_tokens += NUM_LAYERS * NUM_KV_HEADS * sum(n for _, n in self.requests.values())
        self.counts.append(self.state.num_tokens.clone())


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize(
    ("quant", "alpha_high", "alpha_low"), [("k8v4-k4v2", 2.0, 0.8), ("k8v4", 0.8, 0.8)]
)
def test_kernels_equal_the_reference(quant, alpha_high, alpha_low, seed):
    thresholds = Thresholds(alpha_high, alpha_low)
    run, expected = (Run(quant, seed, kernels, thresholds) for kernels in (None, "reference"))
    counts = torch.stack(run.counts)
    assert torch.equal(counts, torch.stack(expected.counts))
    for output, wanted in zip(run.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-4)
    assert bool(counts[..., LOW].any()) == QuantConfig.parse(quant).has_low
    assert int(counts.sum()) < run.num_tokens  # some were dropped


def test_without_a_low_tier_alpha_high_keeps_what_it_would_demote():
    """With alpha_low 0 nothing is dropped."""
    run = Run("k8v4", 5, None, Thresholds(3.0, 0.0))
    assert int(torch.stack(run.counts).sum()) == run.num_tokens
