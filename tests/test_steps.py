"""What the layers of a step share: where tokens are, and what their means are compared with."""

from itertools import pairwise

import pytest
import torch

from diffkv import pool
from diffkv.chains import Chains
from diffkv.lab.evaluation import baselines
from diffkv.layout import PageLayout
from diffkv.packing import spans_of
from diffkv.policies import parse
from diffkv.policy import SCORED_QUERIES, Thresholds, num_queries_seen, paper_tiers
from diffkv.quant import QuantConfig
from diffkv.segments import RowEnds
from diffkv.shape import PoolShape
from diffkv.steps import PromptChunk

CPU = torch.device("cpu")
WINDOW = 8
LENGTHS = (200, 5, 8, 9, 77)
THRESHOLDS = [Thresholds(*alphas) for alphas in ((3, 0.5), (1, 0), (2, 2), (9, 1), (200, 1))]


def chains(policy="paper", segment=0):
    """Rows of requests in a pool of their own."""
    layout = PageLayout.derive(QuantConfig.parse("k8v4-k4v2"), 64, drops=True)
    shape = PoolShape(layout, 1, 1, 20, 512, 1, segment=segment)
    buffer = torch.zeros(shape.table_bytes + layout.page_bytes, dtype=torch.uint8)
    return Chains(pool.create(shape, buffer, torch.bfloat16, WINDOW), policy)


def whole(lengths, policy="paper"):
    """The wave of prompts of one chunk each, one after the other in a batch."""
    known, chunks, start = chains(baselines.parse(policy)), [], 0
    for slot, length in enumerate(lengths):
        known.open(slot, RowEnds(0, length), THRESHOLDS[slot], (), (0,))
        chunks.append(PromptChunk(slot, slice(start, start + length), 0, length))
        start += length
    (wave,) = known.plan(chunks).waves
    return wave


def rows_of(rows, num):
    return torch.arange(num)[rows].tolist()


def test_joined_prompts_are_decided_as_each_alone():
    torch.manual_seed(0)
    (complete,) = whole(LENGTHS).complete
    means = torch.rand(3, sum(LENGTHS)) * 0.05
    means[0, 10] = torch.nan
    tiers = complete.scoring.bounds.tiers(means)
    assert tiers.dtype == torch.int8
    each = zip(tiers.split(LENGTHS, 1), means.split(LENGTHS, 1), THRESHOLDS, strict=True)
    for got, alone, thresholds in each:
        assert torch.equal(got, paper_tiers(alone, thresholds, WINDOW))
    assert {0, 1, 2} == set(tiers.flatten().tolist())


def test_means_are_divided_by_the_queries_that_saw_a_token():
    for scored in (SCORED_QUERIES, 16):
        scoring = whole(LENGTHS, f"paper:queries={scored}").complete[0].scoring
        seen, by = scoring.num_seen.split(LENGTHS), scoring.num_scored.split(LENGTHS)
        for n, num_seen, num_scored in zip(LENGTHS, seen, by, strict=True):
            position, length = torch.arange(n), torch.tensor(n)
            assert num_seen.tolist() == num_queries_seen(position, length, length).tolist()
            assert num_scored.tolist() == (n - position).clamp(max=scored).tolist()


def test_a_policy_that_looks_at_keys_has_no_bounds():
    for text in ("paper:distinct=0.5", "topk", "paper-uniform"):
        assert whole([70], text).complete[0].scoring.bounds is None


def test_chunks_are_cut_into_waves():
    known = chains(parse("paper"), segment=16)
    for slot, length, chain in ((3, 44, ()), (1, 21, (8,)), (2, 40, (9,)), (4, 5, ())):
        thresholds = Thresholds() if slot == 4 else Thresholds(3, 0)
        known.open(slot, RowEnds(16, length), thresholds, chain, (0, 16)[: len(chain) + 1])
    chunks = [
        PromptChunk(3, slice(2, 36), 10, 44, (10, 11)),  # two segments, and the end of the prompt
        PromptChunk(1, slice(36, 41), 16, 21),  # what follows a hit, to the end
        PromptChunk(2, slice(41, 44), 20, 40),  # goes on
        PromptChunk(4, slice(50, 55), 0, 5),  # nothing is decided
    ]
    plan = known.plan(chunks)
    assert rows_of(plan.rows, 60) == [*range(2, 44), *range(50, 55)]
    first, second, third = plan.waves
    assert [(p.slot, p.first, p.stop, p.target) for p in first.parts] == [
        (3, 10, 16, 10), (1, 16, 21, 1), (2, 20, 23, None), (4, 0, 5, 4),
    ]  # fmt: skip
    assert [(p.first, p.stop, p.target) for p in (*second.parts, *third.parts)] == [
        (16, 32, 11), (32, 44, 3),
    ]  # fmt: skip
    assert first.spans.num_keys == (16, 21, 23, 5)
    assert first.waiting.slots.tolist() == [2]
    assert first.waiting.positions.tolist() == [20, 21, 22]
    decided, high = first.complete
    assert decided.packing.slots.tolist() == [10, 1]
    assert decided.packing.positions.tolist() == [*range(16), *range(16, 21)]
    assert decided.waited.tolist() == [3]
    assert decided.scoring.own_starts.tolist() == [0, 16, 21]
    assert decided.scoring.num_own == 21
    assert (high.packing.slots.tolist(), high.scoring) == ([4], None)
    last = third.parts[0]
    assert (last.chain, last.starts, last.closed.slots.tolist()) == (
        (10, 11),
        (0, 16, 32),
        [10, 11],
    )
    assert known._state.chains[3, :2].tolist() == [10, 11]


def test_thresholds_count_all_tokens_so_far():
    known = chains(parse("paper"), segment=16)
    known.open(0, RowEnds(16, 40), Thresholds(3, 0), (5,), (0, 16))
    (wave,) = known.plan([PromptChunk(0, slice(0, 16), 16, 40, (6,))]).waves
    bounds = wave.complete[0].scoring.bounds
    torch.testing.assert_close(bounds.least_high, torch.full((16,), 3 / 32))
    assert bounds.recent.tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize("spans", [[(0, 3), (3, 5)], [(0, 3), (4, 5)], [(7, 9), (0, 1), (1, 3)]])
def test_rows_of_spans(spans):
    slices = [slice(a, b) for a, b in spans]
    rows = spans_of(slices, CPU)
    neighbours = all(a[1] == b[0] for a, b in pairwise(spans))
    assert isinstance(rows, slice) == neighbours
    assert rows_of(rows, 10) == [i for a, b in spans for i in range(a, b)]
