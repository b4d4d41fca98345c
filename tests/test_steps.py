"""What the layers of a step share: where tokens are, and what their means are compared with."""

from itertools import pairwise

import pytest
import torch

from diffkv.lab.evaluation import baselines
from diffkv.policies import parse
from diffkv.policy import SCORED_QUERIES, Thresholds, num_queries_seen, paper_tiers
from diffkv.steps import PromptChunk, PromptPlan, spans_of

CPU = torch.device("cpu")
WINDOW = 8
LENGTHS = (200, 5, 8, 9, 77)
THRESHOLDS = [Thresholds(*alphas) for alphas in ((3, 0.5), (1, 0), (2, 2), (9, 1), (200, 1))]


def whole(lengths, start=0):
    """Prompts of one chunk each, one after the other in a batch."""
    chunks = []
    for slot, length in enumerate(lengths):
        chunks.append(PromptChunk(slot, slice(start, start + length), 0, length))
        start += length
    return chunks


def rows_of(rows, num):
    return torch.arange(num)[rows].tolist()


def test_joined_prompts_are_decided_as_each_alone():
    torch.manual_seed(0)
    plan = PromptPlan.of(whole(LENGTHS), THRESHOLDS, parse("paper"), WINDOW, CPU)
    scoring = plan.complete
    means = torch.rand(3, sum(LENGTHS)) * 0.05
    means[0, 10] = torch.nan
    tiers = scoring.bounds.tiers(means)
    assert tiers.dtype == torch.int8
    each = zip(tiers.split(LENGTHS, 1), means.split(LENGTHS, 1), THRESHOLDS, strict=True)
    for got, alone, thresholds in each:
        assert torch.equal(got, paper_tiers(alone, thresholds, WINDOW))
    assert {0, 1, 2} == set(tiers.flatten().tolist())


def test_means_are_divided_by_the_queries_that_saw_a_token():
    for scored in (SCORED_QUERIES, 16):
        policy = parse(f"paper:queries={scored}")
        scoring = PromptPlan.of(whole(LENGTHS), THRESHOLDS, policy, WINDOW, CPU).complete
        seen, by = scoring.num_seen.split(LENGTHS), scoring.num_scored.split(LENGTHS)
        for n, num_seen, num_scored in zip(LENGTHS, seen, by, strict=True):
            position, length = torch.arange(n), torch.tensor(n)
            assert num_seen.tolist() == num_queries_seen(position, length, length).tolist()
            assert num_scored.tolist() == (n - position).clamp(max=scored).tolist()


def test_a_policy_that_looks_at_keys_has_no_bounds():
    for text in ("paper:distinct=0.5", "topk", "paper-uniform"):
        plan = PromptPlan.of(whole([70]), [Thresholds(1, 0)], baselines.parse(text), WINDOW, CPU)
        assert plan.complete.bounds is None


def test_chunks_are_packed():
    chunks = [
        PromptChunk(3, slice(2, 6), 10, 14),  # the end of a prompt
        PromptChunk(1, slice(9, 14), 0, 5),  # a whole one
        PromptChunk(2, slice(14, 17), 4, 20),  # one that goes on
    ]
    decided = [Thresholds(3, 0), Thresholds(3, 0), None]
    plan = PromptPlan.of(chunks, decided, parse("paper"), WINDOW, CPU)
    assert rows_of(plan.rows, 20) == [2, 3, 4, 5, *range(9, 17)]
    assert [(s.start, s.stop) for _, s in plan.parts] == [(0, 4), (4, 9), (9, 12)]
    assert plan.spans.key_starts.tolist() == [0, 14, 19, 26]
    assert plan.spans.query_starts.tolist() == [0, 4, 9, 12]

    undecided, complete = plan.undecided, plan.complete
    assert undecided.slots.tolist() == [2]
    assert rows_of(undecided.rows, 12) == [9, 10, 11]
    assert undecided.positions.tolist() == [4, 5, 6]
    assert complete.packing.positions.tolist() == [*range(14), *range(5)]
    assert complete.packing.starts.tolist() == [0, 14, 19]
    assert complete.stored_slots.tolist() == [3]
    assert complete.query_rows is None  # 14 queries score it, 4 are here
    assert complete.query_starts.tolist() == [0, 14, 19]

    nothing = PromptPlan.of(chunks, [None] * 3, parse("paper"), WINDOW, CPU)
    assert nothing.complete is None
    assert nothing.undecided.positions.tolist() == [*range(10, 14), *range(5), 4, 5, 6]


def test_scoring_queries_of_whole_prompts():
    plan = PromptPlan.of(whole([100, 30]), [Thresholds(1, 0)] * 2, parse("paper"), WINDOW, CPU)
    scoring = plan.complete
    assert rows_of(scoring.query_rows, 130) == [*range(36, 100), *range(100, 130)]
    assert scoring.query_starts.tolist() == [0, 64, 94]
    assert scoring.max_queries == 64


@pytest.mark.parametrize("spans", [[(0, 3), (3, 5)], [(0, 3), (4, 5)], [(7, 9), (0, 1), (1, 3)]])
def test_rows_of_spans(spans):
    slices = [slice(a, b) for a, b in spans]
    rows = spans_of(slices, CPU)
    neighbours = all(a[1] == b[0] for a, b in pairwise(spans))
    assert isinstance(rows, slice) == neighbours
    assert rows_of(rows, 10) == [i for a, b in spans for i in range(a, b)]
