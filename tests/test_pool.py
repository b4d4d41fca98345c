"""The pool: the budget, the ring, and sums that travel with their tokens."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pool import (
    HEAD_DIM,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_SLOTS,
    assert_only_counted,
    make_state,
    num_free,
    read,
    store,
    tensors,
)

from diffkv import pool, reference
from diffkv.layout import PageLayout
from diffkv.ops import load
from diffkv.policy import DROPPED, HIGH, LOW
from diffkv.quant import ConfigError, QuantConfig
from diffkv.shape import PoolShape
from diffkv.state import TENSORS, PoolState


@pytest.fixture(params=["reference", "cpu"])
def ops(request):
    return load("cpu", request.param)


def kept_sums(state, slot, layer):
    """For each head: position -> (tier, sum)."""
    contents = read(state)
    return [
        {
            position: (tier, total)
            for tier, (positions, totals, *_) in enumerate(contents[slot, layer, head])
            for position, total in zip(positions.tolist(), totals.tolist(), strict=True)
        }
        for head in range(NUM_KV_HEADS)
    ]


def all_high(num_tokens):
    return [[HIGH] * num_tokens] * NUM_KV_HEADS, [[0.0] * num_tokens] * NUM_KV_HEADS


def test_an_empty_pool():
    """Every tensor, with the values of a few of its elements."""
    state = make_state("k8v4-k4v2", 256, num_pages=5, num_slots=3)
    width, leaves = state.directory_width, state.num_leaves
    heads = (3, NUM_LAYERS, NUM_KV_HEADS)
    assert leaves == 3 + 3 * NUM_LAYERS * NUM_KV_HEADS * 2  # 5 pages, 2 a leaf; half-empty ones
    expected = {
        "overruns": (torch.int32, (1,), [0]),
        "demotions": (torch.int64, (1,), [0]),
        "thresholds": (torch.float32, (3, 2), [0.0] * 6),
        "prompt_lens": (torch.int32, (3,), [0, 0, 0]),
        "chains": (torch.int32, (3, state.chain_width), [-1, -1]),
        "chain_lens": (torch.int32, (3,), [0, 0, 0]),
        "centres": (torch.bfloat16, (*heads, HEAD_DIM), [0.0]),
        "directory": (torch.int32, (*heads, width), [-1, -1]),
        "num_tokens": (torch.int32, (*heads, 2), [0, 0]),
        "num_pages_held": (torch.int32, (*heads, 2), [0, 0]),
        "leaves": (torch.int32, (leaves, 2), [-1, -1]),
        "free_leaves": (torch.int32, (leaves,), [0, 1, 2, 3]),
        "leaf_ends": (torch.int64, (2,), [0, leaves]),
        "free_ring": (torch.int32, (5,), [0, 1, 2, 3, 4]),
        "ring_ends": (torch.int64, (2,), [0, 5]),
        "pages": (torch.uint8, (5, 256), []),
    }
    assert list(expected) == list(TENSORS)
    fields = {each.name for each in dataclasses.fields(PoolState)}
    assert fields == {"layout", "dtype", "window", "segment", *expected}
    for name, (dtype, shape, values) in expected.items():
        tensor = getattr(state, name)
        assert (tensor.dtype, tensor.shape) == (dtype, shape), name
        assert tensor.flatten()[: len(values)].tolist() == values, name


def test_full_is_not_empty(ops):
    # Two pages of 2 tokens for each of two heads: four pages, the whole pool.
    state = make_state("k8v4", 96, num_pages=4)
    assert state.layout.high.tokens_per_page == 2
    store(ops, state, 0, [(0, range(4))], *all_high(4))
    assert num_free(state) == 0
    pool.check_invariants(state)

    before = tensors(state)
    store(ops, state, 0, [(1, range(1))], *all_high(1))
    assert_only_counted(state, before)

    ops.release(state, torch.tensor([0], dtype=torch.int32), -1)
    assert num_free(state) == 4
    assert state.ring_ends.tolist() == [4, 8]
    pool.check_invariants(state)


def test_a_plan_that_wants_too_much_takes_nothing(ops):
    state = make_state("k8v4", 96, num_pages=4 * NUM_LAYERS + 1)
    for layer in range(NUM_LAYERS):
        store(ops, state, layer, [(0, range(4))], *all_high(4))
    state.prompt_lens[0] = 4
    before = tensors(state)
    # Every head's last page is full, so four heads want one page each, and one is free.
    plan = ops.plan_decode(
        state, torch.tensor([0], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    )
    assert (plan.places == -1).all()
    key = torch.ones(1, NUM_KV_HEADS, HEAD_DIM)
    ops.append(state, 0, plan, key, key)
    assert_only_counted(state, before)


def test_the_ring_wraps_around(ops):
    state = make_state("k8v4", 96, num_pages=7)
    wrapped = 0
    for turn in range(40):
        slot, num_tokens = turn % NUM_SLOTS, 1 + turn % 6
        head = int(state.ring_ends[0])
        store(ops, state, turn % 2, [(slot, range(num_tokens))], *all_high(num_tokens))
        wrapped += head // 7 < int(state.ring_ends[0] - 1) // 7
        pool.check_invariants(state)
        assert num_free(state) == 7 - NUM_KV_HEADS * -(-num_tokens // 2)
        ops.release(state, torch.tensor([slot], dtype=torch.int32), -1)
        pool.check_invariants(state)
        assert num_free(state) == 7
    assert wrapped >= 10
    assert state.ring_ends[0] > 10 * 7


def test_sums_travel_with_their_tokens_when_stored(ops):
    state = make_state("k8v4-k4v2", 128, num_pages=20)
    tiers = [[LOW, HIGH, DROPPED, LOW, HIGH], [DROPPED, LOW, HIGH, HIGH, HIGH]]
    sums = [[0.5, 1.5, 2.5, 3.5, 4.5], [10.0, 11.0, 12.0, 13.0, 14.0]]
    store(ops, state, 1, [(2, range(20, 25))], tiers, sums)
    assert kept_sums(state, 2, 1) == [
        {20: (LOW, 0.5), 21: (HIGH, 1.5), 23: (LOW, 3.5), 24: (HIGH, 4.5)},
        {21: (LOW, 11.0), 22: (HIGH, 12.0), 23: (HIGH, 13.0), 24: (HIGH, 14.0)},
    ]


def test_sums_travel_with_their_tokens_when_demoted(ops):
    state = make_state("k8v4-k4v2", 128, num_pages=40)
    # After 5 tokens and with a window of 3, tokens 0, 1 and 2 may be demoted: means are sum / (5 - i).
    sums = [[1.0, 0.4, 0.9, 0.0, 0.0], [0.5, 1.6, 0.6, 0.0, 0.0]]
    tiers = [[HIGH] * 5] * NUM_KV_HEADS
    for layer in range(NUM_LAYERS):
        store(ops, state, layer, [(0, range(5))], tiers, sums)
    state.prompt_lens[0] = 5
    state.thresholds[0] = torch.tensor([5.0, 0.0])  # every mean below 1 is demoted, none is dropped
    plan = ops.plan_decode(
        state, torch.tensor([0], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    )
    key = torch.ones(1, NUM_KV_HEADS, HEAD_DIM)
    for layer in range(NUM_LAYERS):
        ops.append(state, layer, plan, key, key)
        first, second = kept_sums(state, 0, layer)
        f32 = [[float(np.float32(x)) for x in row] for row in sums]
        high = {3: (HIGH, 0.0), 4: (HIGH, 0.0), 5: (HIGH, 0.0)}
        # Head 0: means 0.2, 0.1, 0.3. Head 1: 0.1, 0.4, 0.2.
        assert first == high | {0: (HIGH, 1.0), 1: (LOW, f32[0][1]), 2: (HIGH, f32[0][2])}
        assert second == high | {0: (LOW, 0.5), 1: (HIGH, f32[1][1]), 2: (HIGH, f32[1][2])}


def test_sums_travel_with_their_tokens_when_stored_anew(ops):
    state = make_state("k8v4-k4v2", 128, num_pages=20)
    sums = [[0.5, 1.5, 2.5, 3.5], [4.5, 5.5, 6.5, 7.5]]
    store(ops, state, 0, [(0, range(4))], [[HIGH] * 4] * NUM_KV_HEADS, sums)
    ops.release(state, torch.tensor([0], dtype=torch.int32), 0)
    tiers = [[LOW, DROPPED, HIGH, LOW], [LOW, LOW, LOW, HIGH]]
    store(ops, state, 0, [(0, range(4))], tiers, sums)
    assert kept_sums(state, 0, 0) == [
        {0: (LOW, 0.5), 2: (HIGH, 2.5), 3: (LOW, 3.5)},
        {0: (LOW, 4.5), 1: (LOW, 5.5), 2: (LOW, 6.5), 3: (HIGH, 7.5)},
    ]


@pytest.mark.parametrize(
    ("name", "break_it"),
    [
        ("free \\+ .* held page ids are not", lambda s: s.ring_ends[0].add_(1)),
        ("free \\+ .* held leaf ids are not", lambda s: s.leaf_ends[0].add_(1)),
        ("some page is free or held twice", lambda s: s.leaves[0, 0].fill_(int(s.leaves[1, 0]))),
        ("some leaf is free or held twice", lambda s: s.directory[0, 0, 0, 0].fill_(1)),
        ("than their tokens need", lambda s: s.num_tokens[0, 0, 0, 0].add_(9)),
        ("not where the counts say", lambda s: s.directory[0, 0].copy_(s.directory[0, 0].flip(-1))),
        ("plans wanted more", lambda s: s.overruns.add_(1)),
        ("page ids are free", lambda s: s.ring_ends[1].add_(100)),
    ],
)
def test_a_broken_pool_is_noticed(name, break_it):
    state = make_state("k8v4-k4v2", 128, num_pages=20)
    store(reference, state, 0, [(0, range(4))], *all_high(4))
    pool.check_invariants(state)
    break_it(state)
    with pytest.raises(AssertionError, match=name):
        pool.check_invariants(state)


FORMATS = ["k8v4-k4v2", "k8v4", "k16v16", "k4v1"]


@given(
    budget_bytes=st.integers(0, 1 << 22),
    quant=st.sampled_from(FORMATS).map(QuantConfig.parse),
    num_layers=st.integers(3, 5),
    num_kv_heads=st.integers(1, 4),
    max_model_len=st.integers(1, 600),
    max_num_seqs=st.integers(1, 64),
    segment=st.sampled_from([0, 64, 256]),
)
@settings(max_examples=200, deadline=None)
def test_pages_and_tables_fit_the_budget(
    budget_bytes, quant, num_layers, num_kv_heads, max_model_len, max_num_seqs, segment
):
    layout = PageLayout.derive(quant, 64)
    sizes = (layout, num_layers, num_kv_heads, max_model_len)
    try:
        shape = PoolShape.fit(budget_bytes, *sizes, max_num_seqs, segment)
    except ConfigError as error:
        assert f"a KV budget of {budget_bytes} bytes cannot hold one request" in str(error)
        assert f"of {max_model_len} tokens, 25% of them high" in str(error)
        # Refused only if a request does not fit beside the tables of as many slots as there are.
        heads = num_layers * num_kv_heads
        slots = PoolShape.slots_within(budget_bytes, layout, heads, max_num_seqs, segment)
        one = PoolShape(layout, num_layers, num_kv_heads, 1, max_model_len, 0, segment=segment)
        others = max(0, slots - 1 - one.max_rows) * one.slot_bytes
        assert budget_bytes < PoolShape.request_bytes(*sizes, segment) + others
        return
    pages_bytes = shape.num_pages * layout.page_bytes
    assert pages_bytes + shape.table_bytes <= budget_bytes
    another = dataclasses.replace(shape, num_pages=shape.num_pages + 1)
    assert another.num_pages * layout.page_bytes + another.table_bytes > budget_bytes, (
        "one more page would have fitted"
    )
    assert shape.num_pages >= shape.request_pages(0.25)
    assert shape.num_slots >= 1
    assert segment or shape.num_slots <= max_num_seqs

    buffer = torch.empty(budget_bytes, dtype=torch.uint8)
    state = pool.create(shape, buffer, torch.bfloat16, window=64)
    pool.check_invariants(state)
    assert num_free(state) == shape.num_pages
    assert state.pages.untyped_storage().data_ptr() == buffer.data_ptr()
    assert state.directory.shape[:3] == (shape.num_slots, num_layers, num_kv_heads)
    assert state.max_pages >= layout.max_pages(max_model_len)


def test_a_budget_that_is_too_small_says_what_would_do():
    layout = PageLayout.derive(QuantConfig.parse("k8v4-k4v2"), 128)
    needed = PoolShape.request_bytes(layout, 4, 2, 1000)
    assert PoolShape.fit(needed, layout, 4, 2, 1000, max_num_seqs=1).num_slots == 1
    with pytest.raises(ConfigError) as error:
        PoolShape.fit(needed - 1, layout, 4, 2, 1000, max_num_seqs=1)
    assert str(error.value) == (
        f"a KV budget of {needed - 1} bytes cannot hold one request of 1000 tokens, 25% of them high "
        f"({needed} bytes, and tables for 1 rows): raise the budget, or lower max_model_len or "
        f"max_num_seqs"
    )


@pytest.mark.parametrize(
    ("num_layers", "max_model_len", "segment"),
    [(80, 1 << 20, 1024), (32, 1 << 20, 512), (32, 1 << 17, 256)],
)
def test_entries_of_leaves_can_be_numbered_in_32_bits(num_layers, max_model_len, segment):
    layout = PageLayout.derive(QuantConfig.parse("k8v4-k4v2"), 128)
    shape = PoolShape.fit(110 << 30, layout, num_layers, 8, max_model_len, 1024, segment)
    assert shape.num_leaves * shape.leaf_entries <= 1 << 31
    with pytest.raises(ConfigError, match="too large: lower the KV budget"):
        dataclasses.replace(shape, num_pages=1 << 31)


@pytest.mark.parametrize("max_model_len", [8 << 10, 32 << 10, 128 << 10])
def test_short_rows_have_slots_for_a_hundredth_of_the_budget(max_model_len):
    """Four for each segment, where they cost no more than that beyond what there are at least."""
    layout = PageLayout.derive(QuantConfig.parse("k8v8-k4v2"), 128)
    budget, heads = 24 << 30, (32, 8)
    shape = PoolShape.fit(budget, layout, *heads, max_model_len, 256, 2048)
    segments = budget / (256 * 2048 * layout.page_token_bytes(1))
    one = PoolShape(layout, *heads, 1, max_model_len, 0, segment=2048)
    rows = (shape.num_slots - 512) / segments
    if max_model_len == 8 << 10:
        assert rows == pytest.approx(4, abs=0.01)
    else:
        assert 1.25 < rows < 4
        spare = (rows - 1.25) * segments * one.slot_bytes
        assert spare == pytest.approx(0.01 * budget, rel=0.01)


def test_a_buffer_smaller_than_the_shape_is_refused():
    layout = PageLayout.derive(QuantConfig.parse("k8v4"), 64)
    shape = PoolShape.fit(1 << 20, layout, 1, 1, 100, 4)
    with pytest.raises(ValueError, match="is too small for"):
        pool.create(shape, torch.empty(1 << 19, dtype=torch.uint8), torch.bfloat16, window=64)
