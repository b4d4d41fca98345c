import dataclasses
import importlib

import pytest
import torch
from make import FORMATS, copy_of, fill, make_state

from diffkv import reference
from diffkv.kernels import triton as kernels
from diffkv.kernels.triton.workspace import workspace
from diffkv.reference.pages import page_id, segment

OUTPUT_ERROR = {torch.float32: 2e-5, torch.bfloat16: 3e-3, torch.float16: 6e-4}
SUM_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def sums_of(state, layer):
    """[kept tokens] significance sums, and the same bytes cleared, so that pages can be compared."""
    sums = []
    for row in torch.cartesian_prod(*map(torch.arange, state.num_tokens[:, layer].shape)).tolist():
        slot, head, tier = row
        if tier >= len(state.layout.tiers):
            continue
        layout, kept = state.layout.tiers[tier], int(state.num_tokens[slot, layer, head, tier])
        for start in range(0, kept, layout.tokens_per_page):
            page = page_id(state, (slot, layer, head), tier, start // layout.tokens_per_page)
            num = min(layout.tokens_per_page, kept - start)
            place = segment(state, page, layout.sums, num, torch.float32)
            sums.append(place.clone())
            place.zero_()
    return torch.cat(sums)


def check(state, slots, group, layer=0):
    """attend, against the reference: output, sums, and nothing else changed."""
    expected = copy_of(state)
    heads, head_dim = state.num_kv_heads, state.layout.head_dim
    slots = torch.tensor(slots, dtype=torch.int32)
    query = torch.randn(len(slots), heads * group, head_dim).to(state.dtype)
    output, wanted = torch.full_like(query, torch.nan), torch.empty_like(query)
    kernels.attend(state, layer, slots, query, head_dim**-0.5, output)
    reference.attend(expected, layer, slots, query, head_dim**-0.5, wanted)
    error = (output.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-9)
    assert error < OUTPUT_ERROR[state.dtype]
    got, want = sums_of(state, layer), sums_of(expected, layer)
    assert (got - want).abs().max() < SUM_ERROR[state.dtype]
    assert torch.equal(state.pages, expected.pages), "bytes beside the sums have changed"
    return output


def filled(quant, head_dim, dtype, lens, **options):
    """A pool whose unused bytes are random, as pages are that others have used."""
    state = make_state(quant, head_dim, dtype, max_tokens=max(lens) + 8, **options)
    state.pages.copy_(torch.randint(0, 256, state.pages.shape, dtype=torch.uint8))
    fill(reference, state, lens)
    return state


@pytest.mark.parametrize(
    ("quant", "head_dim", "dtype", "group"),
    [*((quant, 64, torch.float32, 4) for quant in FORMATS),
     ("k8v4-k4v2", 64, torch.bfloat16, 4), ("k8v4g1x2-k4v2g2x4", 80, torch.float16, 3),
     ("k16v16", 128, torch.bfloat16, 8), ("k16v16", 96, torch.float32, 1),
     ("k16v16", 64, torch.float16, 2), ("k8v2-k2v1g1x4", 64, torch.float32, 16),
     ("k8v8g2x4-k4v4g4x4", 96, torch.float32, 2), ("k4v1", 256, torch.bfloat16, 2),
     ("k1v1g4x4", 128, torch.float32, 5), ("k16v8-k8v8", 64, torch.float32, 4)],
)  # fmt: skip
def test_attend_matches_the_reference(quant, head_dim, dtype, group):
    state = filled(quant, head_dim, dtype, [37, 17, 90])
    output = check(state, [2, -1, 0, 1], group)
    assert not output[1].any(), "a row that is no request is not 0"


@pytest.mark.parametrize("num", [1, 15, 16, 17, 63, 64, 65, 128, 129])
def test_page_and_tile_boundaries(num):
    check(filled("k16v16", 64, torch.float32, [num], num_slots=1), [0], 2)


@pytest.mark.parametrize("page_bytes", [1024, 2048, 6784])
def test_any_number_of_tokens_per_page(page_bytes):
    state = filled("k8v4-k4v2", 128, torch.float32, [75, 9], page_bytes=page_bytes)
    check(state, [0, 1], 4)


@pytest.mark.parametrize("score_tiles", [0, 3])
def test_significance_where_probabilities_are_not_kept(score_tiles):
    state = filled("k8v4-k4v2", 64, torch.float32, [150, 90, 33])
    work = workspace(state)
    work.tuning = dataclasses.replace(work.tuning, score_tiles=score_tiles)
    check(state, [0, 2, 1], 4)


def test_one_long_ragged_request_in_chunks():
    state = filled("k8v4-k4v2", 64, torch.float32, [3, 2200], num_slots=2, num_kv_heads=2)
    items = workspace(state)
    check(state, [1, 0], 4)
    assert int(items.buffers["num_items"][0]) > 6, "the work was not split"


def test_a_work_list_of_many_programs(monkeypatch):
    module = importlib.import_module("diffkv.kernels.triton.attend")
    monkeypatch.setattr(module, "LIST_ROWS", 2)
    monkeypatch.setattr(module, "LIST_COUNT", 4)
    check(filled("k8v4-k4v2", 64, torch.float32, [40, 0, 90, 1], num_slots=4), [3, 0, 1, -1, 2], 2)


def test_a_request_without_tokens():
    state = filled("k8v4-k4v2", 64, torch.float32, [0, 20])
    output = check(state, [0, 1], 2)
    assert not output[0].any()


def test_the_same_whatever_else_is_in_the_batch():
    state = filled("k8v4-k4v2", 64, torch.float32, [150, 90, 33])
    alone, query = copy_of(state), torch.randn(3, 4, 64)
    out, one = torch.empty_like(query), torch.empty(1, 4, 64)
    every = torch.tensor([0, 1, 2], dtype=torch.int32)
    kernels.attend(state, 0, every, query, 0.125, out)
    kernels.attend(alone, 0, every[1:2], query[1:2].contiguous(), 0.125, one)
    assert torch.equal(out[1:2], one)


def test_wrong_arguments_are_named():
    state = filled("k8v4", 64, torch.float32, [5])
    slots = torch.zeros(1, dtype=torch.int32)
    query = torch.zeros(1, 4, 64)
    with pytest.raises(ValueError, match="query must have a multiple of 2 heads"):
        kernels.attend(state, 0, slots, query[:, :3], 1.0, query)
    with pytest.raises(ValueError, match=r"^output must be a contiguous tensor"):
        kernels.attend(state, 0, slots, query, 1.0, query.half())


@pytest.mark.parametrize(
    ("head_dim", "group", "heads", "dtype", "lens", "query_lens", "max_queries"),
    [(64, 4, 2, torch.bfloat16, [130, 1, 64, 0, 300], [130, 1, 64, 0, 70], 64),
     (80, 3, 1, torch.float32, [200], [100], 64), (128, 16, 1, torch.float16, [129], [129], 100),
     (96, 1, 2, torch.float32, [40, 3], [40, 3], 7), (64, 1, 1, torch.float32, [1], [1], 64)],
)  # fmt: skip
def test_significance_matches_the_reference(
    head_dim, group, heads, dtype, lens, query_lens, max_queries
):
    query = torch.randn(sum(query_lens), heads * group, head_dim).to(dtype)
    key = torch.randn(sum(lens), heads, head_dim).to(dtype)
    starts_q = torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32)
    starts_k = torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32)
    arguments = (query, key, starts_q, starts_k, head_dim**-0.5, max_queries)
    got, want = kernels.significance(*arguments), reference.significance(*arguments)
    assert (got - want).abs().max() < 1e-5
    assert want.max() > 0.1
