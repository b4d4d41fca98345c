"""The work list of attention: every token in one chunk, and no more chunks than there is room for."""

import collections

import pytest
import torch
from backends import INTERPRETED

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkv.kernels.triton import constants, worklist
from diffkv.kernels.triton.closed import CHAIN_CHUNKS, most_closed_chunks
from diffkv.kernels.triton.items import ITEM_FIELDS, LISTS, ROW_FIELDS
from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig
from diffkv.shape import PoolShape

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="lists are made in Triton's interpreter")

LAYERS = 1
WIDTH = 300
LENGTHS = st.one_of(st.integers(0, 300), st.integers(0, 40_000), st.just(4096), st.just(200_000))


def listed(layout, counts, table, directory, lengths=None, longer=1):
    """(fields of rows, items of open rows, of closed ones) of a batch of requests with one head each.

    Items are (tier, *fields), by number. There are chains where their lengths are given; slot i has its
    closed rows from place i * WIDTH on.
    """
    num, room = len(counts), len(counts) * worklist.most_chunks(table)
    width = WIDTH if lengths else 0
    closed = most_closed_chunks(layout, width)
    closed_room = num * CHAIN_CHUNKS
    items = torch.full((2 * (room + closed_room), ITEM_FIELDS), -1, dtype=torch.int32)
    row_items = torch.zeros(num, ROW_FIELDS, dtype=torch.int32)
    num_items = torch.zeros(LISTS + 1, dtype=torch.int32)
    num_tokens = torch.tensor(counts, dtype=torch.int32).view(num, LAYERS, 1, 2)
    slots = torch.arange(num, dtype=torch.int32)
    worklist.list_kernel[(-(-num // 4),)](
        slots,
        torch.tensor(lengths or [0] * num, dtype=torch.int32),
        directory,
        num_tokens,
        items,
        row_items,
        num_items,
        0,
        num,
        3,
        room,
        closed_room,
        L=LAYERS,
        H=1,
        TABLE=constants.Table(*table),
        TIERS=constants.tiers_of(layout),
        TILE=32,
        TOKENS=worklist.CHUNK_TOKENS,
        MAX=worklist.most_chunks(table),
        CHAIN_WIDTH=width,
        LONGER=longer,
        CLOSED=closed,
        ROWS=4,
        COUNT=8,
    )
    *lengths, taken = num_items.tolist()
    assert taken == 3, "the first item that no program begins with"
    starts = [0, closed_room, closed_room + room, 2 * closed_room + room]
    each = [
        [(tier, *fields) for fields in items[start : start + length].tolist()]
        for start, length, tier in zip(starts, lengths, (1, 1, 0, 0), strict=True)
    ]
    in_order = [sorted(each[i] + each[i + 2], key=lambda item: item[2]) for i in (1, 0)]
    for numbered, first in zip(in_order, (0, room), strict=True):
        assert [item[2] for item in numbered] == list(range(first, first + len(numbered)))
    return row_items, *in_order


@pytest.mark.parametrize(
    ("quant", "head_dim"), [("k8v4-k4v2", 128), ("k4v2", 128), ("k2v1", 64), ("k16v16", 256)]
)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=9),
    entries=st.sampled_from([0, 0, 1024]),
)
def test_every_token_is_in_one_chunk_and_all_chunks_have_room(quant, head_dim, rows, entries):
    layout = PageLayout.derive(QuantConfig.parse(quant), head_dim)
    counts = [(high, low if layout.low else 0) for high, low in rows]
    shape = PoolShape(layout, 1, 1, 1, max(map(sum, counts)), 1, entries)
    table = width, leaf = shape.directory_width, shape.leaf_entries
    directory = torch.randperm(len(counts) * width).to(torch.int32).view(len(counts), width)
    row_items, items, closed = listed(layout, counts, table, directory)
    pages = [
        -(-count // tier.tokens_per_page)
        for row in counts
        for count, tier in zip(row, layout.tiers, strict=False)
    ]
    assert len(items) == int(row_items[:, 1].sum()) and not len(closed)
    assert len(items) <= worklist.most_items(layout, len(counts), sum(pages), table)
    assert int(row_items[:, 1].max()) <= worklist.most_chunks(table)
    longest = worklist.most_chunk_pages(layout, table)
    for (first, num, _, _), row_counts, row in zip(
        row_items.tolist(), counts, range(99), strict=False
    ):
        seen = [0, 0]
        for tier, item_row, _, entry, tokens, _, _ in items[first : first + num]:
            per_page = layout.tiers[tier].tokens_per_page
            assert item_row == row
            page, index = divmod(seen[tier], per_page)
            assert index == 0, "a chunk begins with a page"
            column = page // leaf if tier == 0 else width - 1 - page // leaf
            assert entry == int(directory[row, column]) * leaf + page % leaf
            assert 0 < tokens <= longest * per_page
            assert page % leaf + -(-tokens // per_page) <= leaf, "a chunk is within one leaf"
            seen[tier] += tokens
        assert tuple(seen) == row_counts


@pytest.mark.parametrize("quant", ["k8v4-k4v2", "k16v16"])
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 8), st.integers(0, WIDTH)), min_size=1, max_size=9),
    longer=st.integers(1, 9),
)
def test_every_part_of_every_closed_row_is_in_one_chunk(quant, lengths, longer):
    """A chain's chunks depend on its length alone."""
    layout = PageLayout.derive(QuantConfig.parse(quant), 128)
    num, table = len(lengths), (9, 64)
    directory = torch.zeros(num, table[0], dtype=torch.int32)
    row_items, _, items = listed(layout, [(5, 0)] * num, table, directory, lengths, longer)
    assert len(items) == int(row_items[:, 3].sum())
    room = num * worklist.most_chunks(table)
    for row, length in enumerate(lengths):
        first, count = row_items[row, 2:].tolist()
        assert count <= most_closed_chunks(layout, WIDTH)
        parts_of, counts_of = collections.defaultdict(list), collections.defaultdict(set)
        for tier, item_row, _, place, rows, part, parts in items[first - room :][:count]:
            assert item_row == row and rows > 0
            counts_of[tier].add(parts)
            for closed in range(place, place + rows):
                parts_of[tier, closed - row * WIDTH].append(part)
        tiers = range(len(layout.tiers))
        assert set(parts_of) == {(tier, closed) for tier in tiers for closed in range(length)}
        for (tier, _), parts in parts_of.items():
            assert parts == list(range(*counts_of[tier]))
