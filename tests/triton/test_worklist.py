"""The work list of attention: every token in one chunk, and no more chunks than there is room for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkv.kernels.triton import facts, worklist
from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig

LAYERS = 1
LENGTHS = st.one_of(st.integers(0, 300), st.integers(0, 40_000), st.just(4096), st.just(200_000))


def listed(layout, counts):
    """(items of rows, fields of all) of a batch of requests with one head each."""
    num = len(counts)
    items = torch.full((num * worklist.MAX_CHUNKS, worklist.ITEM_FIELDS), -1, dtype=torch.int32)
    row_items, num_items = torch.zeros(num, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    num_tokens = torch.tensor(counts, dtype=torch.int32).view(num, LAYERS, 1, 2)
    slots = torch.arange(num, dtype=torch.int32)
    worklist.list_kernel[(-(-num // 4),)](
        slots, num_tokens, items, row_items, num_items, 0, num, 3,
        L=LAYERS, H=1, TIERS=facts.tiers_of(layout), TILE=32, TOKENS=worklist.CHUNK_TOKENS,
        MAX=worklist.MAX_CHUNKS, ROWS=4, COUNT=8,
    )  # fmt: skip
    return row_items, items[: num_items[0]]


@pytest.mark.parametrize(
    ("quant", "head_dim"), [("k8v4-k4v2", 128), ("k4v2", 128), ("k2v1", 64), ("k16v16", 256)]
)
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=9))
def test_every_token_is_in_one_chunk_and_all_chunks_have_room(quant, head_dim, rows):
    layout = PageLayout.derive(QuantConfig.parse(quant), head_dim)
    counts = [(high, low if layout.low else 0) for high, low in rows]
    row_items, items = listed(layout, counts)
    pages = [
        -(-count // tier.tokens_per_page)
        for row in counts
        for count, tier in zip(row, layout.tiers, strict=False)
    ]
    assert len(items) == int(row_items[:, 1].sum())
    assert len(items) <= worklist.most_items(layout, len(counts), sum(pages))
    assert int(row_items[:, 1].max()) <= worklist.MAX_CHUNKS
    widest = max(sum(pages[i : i + len(layout.tiers)]) for i in range(len(pages)))
    longest = worklist.most_chunk_pages(layout, widest)
    for (first, num), row_counts, row in zip(row_items.tolist(), counts, range(99), strict=False):
        seen = [0, 0]
        for row_tier, slot, first_page, tokens, _, *_ in items[first : first + num].tolist():
            tier = row_tier % 2
            per_page = layout.tiers[tier].tokens_per_page
            assert (row_tier // 2, slot) == (row, row)
            assert first_page * per_page == seen[tier]
            assert 0 < tokens <= longest * per_page
            seen[tier] += tokens
        assert tuple(seen) == row_counts
