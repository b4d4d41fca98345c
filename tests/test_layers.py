"""Formats by layer: what one pool under several groups of layers does is what each would do alone."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkv import ops, pool
from diffkv.cache import DiffKVCache, PromptChunk
from diffkv.layout import CacheLayout, PageLayout
from diffkv.policy import LOW, Thresholds
from diffkv.quant import ConfigError, Format, LayerQuant, QuantConfig
from diffkv.shape import CacheShape

MIXED = "0:k8v4,1-2:k8v4-k4v2,3:k8v4,4:k16v16"
NUM_LAYERS, NUM_KV_HEADS, GROUP, HEAD_DIM = 5, 2, 2, 8
NUM_SLOTS, MAX_MODEL_LEN, WINDOW, PAGE_BYTES = 3, 40, 4, 160
THRESHOLDS = Thresholds(2.0, 0.8)
NUM_STEPS = 40


# the text form

formats = st.builds(Format, st.sampled_from([16, 8, 4]), st.sampled_from([8, 4, 2]))
configs = st.one_of(
    st.builds(QuantConfig, formats),
    st.sampled_from(["k8v4-k4v2", "k8v8-k2v1"]).map(QuantConfig.parse),
)


@given(st.lists(configs, min_size=1, max_size=12), st.booleans(), st.randoms())
def test_text_says_every_layer(chosen, is_open, rnd):
    """Each layer named on its own, in any order, is read back, as is the shorter form of it."""
    parts = [f"{layer}:{config}" for layer, config in enumerate(chosen)]
    if is_open:
        parts[-1] = parts[-1].replace(":", "-:", 1)
    rnd.shuffle(parts)
    quant = LayerQuant.parse(", ".join(parts))
    groups = quant.groups(len(chosen))
    assert {layer: config for config, layers in groups.items() for layer in layers} == dict(
        enumerate(chosen)
    )
    assert list(groups) == list(dict.fromkeys(chosen))
    assert LayerQuant.parse(str(quant)) == quant
    assert quant.has_low == any(config.low is not None for config in chosen)
    assert len(quant.spans) == 1 + sum(a != b for a, b in pairwise(chosen))


def test_one_configuration_is_that_of_all_layers():
    assert LayerQuant.parse("0-:k8v4-k4v2") == LayerQuant.parse("k8v4-k4v2")
    assert str(LayerQuant.parse("0:k8v4,1-:k8v4")) == "k8v4"
    assert str(LayerQuant.parse("4-:k8v4, 0-3:K8V8")) == "0-3:k8v8,4-:k8v4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1-:k8v4", "no formats for layer 0 in 1-:k8v4: add 0:<formats>"),
        (
            "0-3:k8v8,6-:k8v4",
            "no formats for layers 4-5 in 0-3:k8v8,6-:k8v4: add 4-5:<formats>",
        ),
        (
            "0-3:k8v8,2-5:k8v4",
            "two formats for layers 2-3 in 0-3:k8v8,2-5:k8v4: name every layer once",
        ),
        (
            "0-:k8v8,5:k8v4",
            "two formats for layer 5 in 0-:k8v8,5:k8v4: name every layer once",
        ),
        (
            "0-5:k8v8,6-8:k8v4",
            "0-5:k8v8,6-8:k8v4 names layer 8, but the model has 8 layers, 0-7",
        ),
        ("0-11:k8v8", "0-11:k8v8 names layers 8-11, but the model has 8 layers, 0-7"),
        ("0-7:k8v8,8-:k8v4", "0-7:k8v8,8-:k8v4 names layers 8-, but the model has 8 layers, 0-7"),
        (
            "0-5:k8v8",
            "no formats for layers 6-7 in 0-5:k8v8: the model has 8 layers, 0-7; add 6-7:<formats>",
        ),
        ("5-0:k8v8", "layers 5-0 run backwards: write 0-5"),
        ("0-3:k8v8,", "unknown layers '': write <first>-<last>:<formats>"),
        ("first:k8v8", "unknown layers 'first:k8v8': write <first>-<last>:<formats>"),
        ("0-:k8v4-k8v8", "the low tier k8v8 has more bits than the high tier k8v4"),
        ("0-:k8v4:k4v2", "unknown format 'k8v4:k4v2'"),
        ("0-:", "unknown format ''"),
    ],
)
def test_refusals_name_the_layers(text, message):
    with pytest.raises(ConfigError) as error:
        LayerQuant.parse(text).groups(8)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# pages


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("text", ["k8v4-k4v2", "k16v16", "k4v2g2x4"])
def test_alike_layers_have_the_page_of_their_configuration(text, head_dim):
    layout = CacheLayout.derive(LayerQuant.parse(text), 7, head_dim)
    (group,) = layout.groups
    assert group.page == PageLayout.derive(QuantConfig.parse(text), head_dim)
    assert group.layers == tuple(range(7))
    assert layout.max_pages(100) == 7 * group.page.max_pages(100)
    assert layout.max_new_pages(3) == 7 * group.page.max_new_pages(3)


def wasted_bytes(layout, page_bytes):
    """Of heads of 1,024 tokens, all of the smallest format: unused shares, and half-empty pages."""
    total = 0.0
    for group in layout.groups:
        page = PageLayout.derive(group.page.quant, layout.head_dim, page_bytes)
        used = 1024 * min(tier.token_bytes for tier in page.tiers)
        unused = max(tier.unused_share(page_bytes) for tier in page.tiers)
        total += len(group.layers) * (unused * used + len(page.tiers) * page_bytes / 2)
    return total


@pytest.mark.parametrize(
    "text", ["0-3:k8v8,4-:k8v4-k4v2", "0:k16v16,1-:k4v2", "0-30:k8v8,31-:k4v1"]
)
def test_the_common_page_wastes_least_over_all_layers(text):
    layout = CacheLayout.derive(LayerQuant.parse(text), 36, 128)
    largest = max(tier.token_bytes for group in layout.groups for tier in group.page.tiers)
    fewest = min(tier.tokens_per_page for group in layout.groups for tier in group.page.tiers)
    assert fewest >= 16
    least = wasted_bytes(layout, layout.page_bytes)
    start = -(-16 * largest // 32) * 32 + 64
    assert all(least <= wasted_bytes(layout, size) + 1e-6 for size in range(start, 2 * start, 32))


@given(st.integers(0, 4000), st.integers(0, 1))
@settings(deadline=None)
def test_num_fitting_is_the_most_that_fits(num_pages, tier):
    layout = CacheLayout.derive(LayerQuant.parse("0:k16v16,1-:k8v4-k4v2"), 6, 64)
    exact, pair = (group.page for group in layout.groups)

    def pages(num_tokens):
        return -(-num_tokens // exact.high.tokens_per_page) + 5 * -(
            -num_tokens // pair.tiers[tier].tokens_per_page
        )

    num_tokens = layout.num_fitting(num_pages, tier)
    assert pages(num_tokens) <= num_pages < pages(num_tokens + 1)


# the cache


class Run:
    """Requests that come, in one step or in chunks, grow and go: the same for every `quant`."""

    def __init__(self, quant, seed, thresholds=THRESHOLDS):
        layout = CacheLayout.derive(
            LayerQuant.parse(quant), NUM_LAYERS, HEAD_DIM, PAGE_BYTES, 4, thresholds.alpha_low > 0
        )
        num_pages = NUM_SLOTS * NUM_KV_HEADS * layout.max_pages(MAX_MODEL_LEN)
        shape = CacheShape(layout, NUM_KV_HEADS, NUM_SLOTS, MAX_MODEL_LEN, num_pages)
        buffer = torch.zeros(shape.table_bytes + num_pages * PAGE_BYTES, dtype=torch.uint8)
        self.state = pool.create_cache(shape, buffer, torch.float32, WINDOW)
        self.cache = DiffKVCache(self.state, ops.load("cpu"), HEAD_DIM**-0.5)
        self.thresholds = thresholds
        self.rnd = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.requests = {}  # slot -> (prompt_len, tokens so far)
        self.outputs = [[] for _ in range(NUM_LAYERS)]
        self.counts = [[] for _ in range(NUM_LAYERS)]
        self.num_tokens = (
            0  # of all requests after each step, over heads: what a layer keeps at most
        )
        for _ in range(NUM_STEPS):
            self.step()
        self.cache.close(list(self.requests))
        self.check()

    def check(self):
        pool.check_invariants(*self.state.groups)
        head, tail = self.state.pool.ring_ends.tolist()
        held = sum(int(group.num_pages_held.sum()) for group in self.state.groups)
        assert tail - head == self.state.num_pages - held

    def step(self):
        ended = [s for s, (_, n) in self.requests.items() if n > 30 or self.rnd.random() < 0.03]
        self.cache.close(ended)
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
            self.outputs[layer].append(output.flatten())
        self.check()
        self.num_tokens += NUM_KV_HEADS * sum(n for _, n in self.requests.values())
        for layer, (group, index) in self.state.places.items():
            self.counts[layer].append(self.state.groups[group].num_tokens[:, index].clone())


@pytest.mark.parametrize("seed", range(4))
def test_mixed_layers_equal_runs_of_their_own_formats(seed):
    mixed = Run(MIXED, seed)
    for config, layers in LayerQuant.parse(MIXED).groups(NUM_LAYERS).items():
        # alone, layers without a low tier know only alpha_low
        alpha_low = THRESHOLDS.alpha_low
        alone = THRESHOLDS if config.low else Thresholds(alpha_low, alpha_low)
        single = Run(str(config), seed, alone)
        for layer in layers:
            counts, expected = (torch.stack(run.counts[layer]) for run in (mixed, single))
            assert torch.equal(counts, expected)
            outputs, expected = (torch.cat(run.outputs[layer]) for run in (mixed, single))
            assert torch.equal(outputs, expected), f"layer {layer}, {config}"
            assert bool(counts[..., LOW].any()) == config.has_low
            assert int(counts.sum()) < mixed.num_tokens  # some were dropped


def test_layers_without_a_low_tier_keep_what_others_demote():
    """With alpha_low 0, all tokens of a layer without a low tier stay high; nothing is dropped."""
    run = Run(MIXED, 5, Thresholds(3.0, 0.0))
    totals = [torch.stack(counts).sum(-1) for counts in run.counts]
    assert all(torch.equal(total, totals[0]) for total in totals)
    assert int(totals[0].sum()) == run.num_tokens
    demoted = [int(torch.stack(counts)[..., LOW].sum()) for counts in run.counts]
    assert [number > 0 for number in demoted] == [False, True, True, False, False]


def test_an_overrun_in_any_group_is_seen():
    layout = CacheLayout.derive(LayerQuant.parse("0:k16v16,1-:k8v4"), 2, HEAD_DIM, PAGE_BYTES, 4)
    shape = CacheShape(layout, NUM_KV_HEADS, 1, 8, 5)
    buffer = torch.zeros(shape.table_bytes + 5 * PAGE_BYTES, dtype=torch.uint8)
    state = pool.create_cache(shape, buffer, torch.float32, WINDOW)
    cache = DiffKVCache(state, ops.load("cpu", "reference"), 1.0)
    cache.open(0, 4, Thresholds())
    none = torch.empty(0, dtype=torch.int32)
    step = cache.plan([PromptChunk(0, slice(0, 4), 0, 4)], slice(0, 0), none, none)
    x = torch.ones(4, NUM_KV_HEADS, HEAD_DIM)
    # two pages for each head of the first layer leave one, and the second layer needs one each
    cache.attend(0, step, x, x, x, torch.empty_like(x))
    pool.check_invariants(*state.groups)
    cache.attend(1, step, x, x, x, torch.empty_like(x))
    assert [int(group.overruns) for group in state.groups] == [1, 1]
    assert not state.groups[1].num_tokens.any()
