"""What the layers of a step share: where tokens are, and what their means are compared with."""

from itertools import pairwise

import pytest
import torch

from diffkv import pool, reference
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
from diffkv.uploads import at_once

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
    scoring, tiers = complete.scoring, torch.empty(means.shape, dtype=torch.int8)
    from_end = torch.cat([torch.arange(n, 0, -1) for n in LENGTHS])
    means *= from_end.clamp(max=64)
    sums = means.clone()
    means /= from_end.clamp(max=64)
    starts = complete.packing.starts
    reference.decide_rows(sums, starts, scoring.bounds, scoring.page_tokens, WINDOW, 64, tiers)
    each = zip(tiers.split(LENGTHS, 1), means.split(LENGTHS, 1), THRESHOLDS, strict=True)
    for got, alone, thresholds in each:
        assert torch.equal(got, paper_tiers(alone, thresholds, WINDOW))
    assert {0, 1, 2} == set(tiers.flatten().tolist())


def test_means_are_divided_by_the_queries_that_saw_a_token():
    for scored in (SCORED_QUERIES, 16):
        each = torch.cat([(n - torch.arange(n)).clamp(max=scored) for n in LENGTHS])
        scoring = whole(LENGTHS, f"topk:queries={scored}").complete[0].scoring
        assert torch.equal(scoring.num_scored, each.float())
        sums, tiers = each.float()[None] / 2, torch.zeros(1, sum(LENGTHS), dtype=torch.int8)
        starts, none = whole(LENGTHS).complete[0].packing.starts, torch.zeros(5, dtype=torch.int32)
        reference.decide_rows(sums, starts, None, none, WINDOW, scored, tiers)
        for n, of_row in zip(LENGTHS, sums[0].split(LENGTHS), strict=True):
            length = torch.tensor(n)
            seen = num_queries_seen(torch.arange(n), length, length)
            assert of_row.tolist() == (seen / 2).tolist()


def test_a_policy_that_looks_at_keys_has_no_bounds():
    for text in ("paper:distinct=0.5", "topk", "paper-uniform"):
        assert whole([70], text).complete[0].scoring.bounds is None
    assert whole([70]).complete[0].scoring.num_scored is None


def test_queries_of_several_rows_are_found_at_once():
    (complete,) = whole([70, 5, 200], "paper:queries=16").complete
    expected = [*range(54, 70), *range(70, 75), *range(259, 275)]
    assert complete.scoring.queries.tolist() == expected
    assert complete.scoring.query_starts.tolist() == [0, 16, 21, 37]
    assert complete.rows == slice(0, 275)


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
    begin, first, second, third = plan.waves
    assert [(p.slot, p.first, p.stop, p.target) for p in (*begin.parts, *first.parts)] == [
        (4, 0, 5, 4), (3, 10, 16, 10), (1, 16, 21, 1), (2, 20, 23, None),
    ]  # fmt: skip
    assert [(p.first, p.stop, p.target) for p in (*second.parts, *third.parts)] == [
        (16, 32, 11), (32, 44, 3),
    ]  # fmt: skip
    assert first.spans.num_keys == (16, 21, 23)
    assert rows_of(first.waiting.rows, 60) == [39, 40, 41]
    assert first.waiting.packing.slots.tolist() == [2]
    assert first.waiting.packing.positions.tolist() == [20, 21, 22]
    (decided,), (high,) = first.complete, begin.complete
    assert decided.packing.slots.tolist() == [10, 1]
    assert decided.packing.positions.tolist() == [*range(16), *range(16, 21)]
    assert decided.waited.tolist() == [3]
    assert decided.packing.starts.tolist() == [0, 16, 21]
    assert decided.packing.num_tokens == 21
    assert (decided.rows, decided.scoring.queries) == (None, None), "ten of slot 3 have waited"
    per_page = known._state.layout.high.tokens_per_page
    assert decided.scoring.page_tokens.tolist() == [per_page, 0], "an open row grows"
    assert decided.centring.tolist() == [[10, 1, -1, -1], [1, 0, 8, -1]]
    (segment,) = second.complete
    assert (segment.rows, segment.scoring.queries) == (slice(6, 22), slice(0, 16))
    assert rows_of(high.rows, 60) == [42, 43, 44, 45, 46]
    assert (high.packing.slots.tolist(), high.scoring) == ([4], None)
    last = third.parts[0]
    assert (last.chain, last.starts) == ((10, 11), (0, 16, 32))
    assert known._state.chains[3, :2].tolist() == [10, 11]
    sight = first.before
    assert (begin.before, begin.after, first.after, second.before) == (None, None, None, None)
    assert sight.starts == (0, 44, 65, 88), "each up to the end of its chunk"
    assert (sight.closed.span, sight.closed.slots.tolist()) == (slice(44, 81), [8, 9])
    assert sight.closed.starts.tolist() == [0, 21]
    assert [(rows.span, rows.slots.tolist()) for rows in sight.waited] == [
        (slice(0, 10), [3]), (slice(81, 85), [2]),
    ]  # fmt: skip
    assert rows_of(sight.places, 88) == [*range(10, 44), *range(60, 65), *range(85, 88)]
    assert rows_of(sight.own, 60) == [*range(42)]
    assert not first.sees_all and not third.sees_all


def test_beginnings_of_prompts_are_attended_to_where_they_are():
    """What is between them counts as prompts of their own, which a later wave attends to again."""
    known, length = chains(parse("paper"), segment=16), 300
    for slot in range(3):
        known.open(slot, RowEnds(16, length), Thresholds(3, 0), (), (0,))
    chunks = [
        PromptChunk(0, slice(0, 16), 0, length, (5,)),
        PromptChunk(1, slice(16, 36), 0, length, (6,)),
        PromptChunk(2, slice(36, 56), 0, length, (7,)),
    ]
    first, second = known.plan(chunks).waves
    assert first.rows == slice(0, 52)
    assert first.spans.num_queries == first.spans.num_keys == (16, 16, 4, 16)
    (complete,) = first.complete
    assert rows_of(complete.rows, 56) == [*range(32), *range(36, 52)]
    assert rows_of(complete.scoring.queries, 56) == rows_of(complete.rows, 56)
    assert (first.after.starts, first.after.closed.slots.tolist()) == ((0, 20, 40), [6, 7])
    assert (first.after.closed.span, first.after.closed.starts.tolist()) == (slice(0, 36), [0, 20])
    assert [p.slot for p in second.parts] == [1, 2] and second.sees_all and second.after is None
    assert rows_of(second.rows, 56) == [*range(32, 36), *range(52, 56)]
    # More between them than there is of them: they are put together
    chunks = [
        PromptChunk(slot, slice(at, at + 64), 0, length, tuple(range(5, 9)))
        for slot, at in ((0, 0), (1, 64))
    ]
    known = chains(parse("paper"), segment=16)
    for slot in range(2):
        known.open(slot, RowEnds(16, length), Thresholds(3, 0), (), (0,))
    first = known.plan(chunks).waves[0]
    assert rows_of(first.rows, 128) == [*range(16), *range(64, 80)]
    assert first.spans.num_queries == (16, 16)


def test_thresholds_count_all_tokens_so_far():
    known = chains(parse("paper"), segment=16)
    known.open(0, RowEnds(16, 40), Thresholds(3, 0), (5,), (0, 16))
    (wave,) = known.plan([PromptChunk(0, slice(0, 16), 16, 40, (6,))]).waves
    bounds = wave.complete[0].scoring.bounds
    torch.testing.assert_close(bounds, torch.tensor([[3 / 32, 0.0]]))


@pytest.mark.parametrize("spans", [[(0, 3), (3, 5)], [(0, 3), (4, 5)], [(7, 9), (0, 1), (1, 3)]])
def test_rows_of_spans(spans):
    slices = [slice(a, b) for a, b in spans]
    rows = spans_of(slices, at_once(CPU))
    neighbours = all(a[1] == b[0] for a, b in pairwise(spans))
    assert isinstance(rows, slice) == neighbours
    assert rows_of(rows, 10) == [i for a, b in spans for i in range(a, b)]
