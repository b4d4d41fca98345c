"""Triton's launches where there is more than one program or kept tile takes at a time."""

import dataclasses
import importlib

import pytest
import torch
from backends import Pair, ints
from make import copy_of, make_state
from test_attend import attended, check, filled
from test_chains import chained

from diffkv import pool
from diffkv.cache import DiffKVCache
from diffkv.quant import ConfigError


def set_blocks(monkeypatch, **modules: dict[str, int]) -> None:
    """Smaller blocks, by module and name."""
    for module, sizes in modules.items():
        for name, size in sizes.items():
            path = importlib.import_module(f"diffkv.kernels.triton.{module}")
            monkeypatch.setattr(path, name, size)


def test_many_programs_and_blocks(triton, monkeypatch):
    """As when there are more heads, requests and pages than one program takes at a time."""
    set_blocks(
        monkeypatch,
        plan={"APPLY_HEADS": 4, "COUNT_BLOCK": 8, "SEARCH_TOKENS": 16},
        store={"COUNT_BLOCK": 16, "SCAN_BLOCK": 4, "PAGE_BLOCK": 2},
        release={"SCAN_BLOCK": 2, "PAGE_BLOCK": 2},
    )
    state = make_state("k8v4-k4v2", num_layers=2, num_kv_heads=3, max_tokens=96)
    state.prompt_lens.copy_(ints(40, 33, 5))
    state.thresholds.copy_(torch.tensor([3.0, 1.0]).expand(3, 2))
    pair = Pair(triton, state)
    for layer in range(2):
        pair.store([1, 2, 0], [33, 5, 80], layer)
    for i in range(2):
        pair.step([0, 1, 2], [81 + i, 34 + i, 6 + i])
    pair.release([1, 0, 2])
    pool.check_invariants(pair.state)


def test_every_head_wants_a_page(triton, monkeypatch):
    set_blocks(monkeypatch, plan={"APPLY_HEADS": 4, "COUNT_BLOCK": 8})
    pair = Pair(triton, make_state("k16v16", num_layers=2, num_kv_heads=3, max_tokens=48))
    for layer in range(2):
        pair.store([0, 1, 2], [16, 16, 32], layer, tiers=torch.zeros(3, 64, dtype=torch.int8))
    pair.step([2, 0, 1], [33, 17, 17])


@pytest.mark.parametrize("alphas", [(1e6, 0.0), (1e6, 1e6)])
def test_equal_means_in_several_blocks_go_by_position(triton, monkeypatch, alphas):
    set_blocks(monkeypatch, plan={"SEARCH_TOKENS": 16})
    state = make_state("k8v4-k4v2", window=2)
    state.thresholds[0], state.prompt_lens[0] = torch.tensor(alphas), 40
    tiers = torch.zeros(2, 40, dtype=torch.int8)
    tiers[:, ::3] = 1
    pair = Pair(triton, state)
    pair.store([0], [40], tiers=tiers, sums=torch.zeros(2, 40))
    for i in range(4):
        pair.step([0], [41 + i])


@pytest.mark.parametrize("score_tiles", [0, 3])
def test_significance_where_probabilities_are_not_kept(triton, monkeypatch, score_tiles):
    from diffkv.kernels.triton import workspace

    of = workspace.Tuning.of
    monkeypatch.setattr(
        workspace.Tuning,
        "of",
        lambda *args: dataclasses.replace(of(*args), score_tiles=score_tiles),
    )
    check(triton, filled(triton, "k8v4-k4v2", [150, 90, 33], 64, torch.float32), [0, 2, 1], 4)
    check(triton, chained(triton, "k8v4-k4v2", 64, torch.float32), [1, -1, 0], 2)


def test_a_long_request_is_split(triton):
    from diffkv.kernels.triton.workspace import workspace

    state = triton.place(filled(triton, "k8v4-k4v2", [3, 1200], 64, torch.float32, num_slots=2))
    attended(triton, state, [1, 0], torch.randn(2, 8, 64))
    assert int(workspace(state).buffers["num_items"][:-1].sum()) > 6, "the work was not split"


def test_a_work_list_of_many_programs(triton, monkeypatch):
    set_blocks(monkeypatch, prepare={"LIST_ROWS": 2}, batch={"LIST_COUNTS": (4, 4, 4)})
    state = filled(triton, "k8v4-k4v2", [40, 0, 90, 1], 64, torch.float32, num_slots=4)
    check(triton, state, [3, 0, 1, -1, 2], 2)


def test_a_work_list_of_many_programs_with_chains(triton, monkeypatch):
    set_blocks(monkeypatch, prepare={"LIST_ROWS": 2}, batch={"LIST_COUNTS": (4, 4, 4)})
    check(triton, chained(triton), [1, -1, 0, 2, 5], 2)


@pytest.mark.parametrize("length", [1, 16, 17, 40])
@pytest.mark.parametrize("quant", ["k8v4-k4v2", "k8v4"])
def test_chains_of_every_length(triton, quant, length):
    """Rows in four parts, in two, whole, and several to a chunk; some end in the middle of a leaf."""
    lens = [5, 9, 0, 33, 70, 1, 20]
    rows = [2 + i % 5 for i in range(length)]
    shape = {"segment": 4, "max_tokens": 96, "num_kv_heads": 1}
    state = chained(triton, quant, 64, torch.float32, lens=lens, chains={0: rows}, **shape)
    check(triton, state, [1, 0], 3)


def test_long_closed_rows_are_in_parts(triton):
    """Each part of more tokens than the smallest chunk, and of more pages than a leaf names."""
    shape = {"segment": 512, "num_kv_heads": 1}
    state = chained(triton, lens=[9, 1300, 450], chains={0: [1], 2: [1, 1]}, **shape)
    check(triton, state, [0, 2], 4)


@pytest.mark.parametrize(("multiprocessors", "longer"), [(1000, 4), (4, 4), (1, 0)])
def test_few_rows_and_a_crowd(triton, monkeypatch, multiprocessors, longer):
    """Batches of these sizes differ in programs, in chunks, and in how much is read at a time."""
    workspaces = importlib.import_module("diffkv.kernels.triton.workspace")
    monkeypatch.setattr(workspaces, "multiprocessors", lambda _: multiprocessors)
    shape = {"segment": 4096, "num_kv_heads": 3}
    state = chained(triton, "k8v8-k4v2", 64, lens=[600, 1300, 40], chains={0: [1], 2: [1]}, **shape)
    placed = triton.place(copy_of(state))
    sizes = importlib.import_module("diffkv.kernels.triton.batch")
    batch = sizes.Batch.of(6, state.segment, workspaces.workspace(placed))
    assert (batch.longer, batch.merged) == (longer, 16 if longer else 8)
    check(triton, state, [0, 2], 4)


def test_buffers_grow_with_requests_where_there_are_chains(triton):
    """Not with slots, most of which closed rows take; and by doubling."""
    from diffkv.kernels.triton.workspace import workspace

    state = triton.place(make_state("k8v4", num_slots=40, max_tokens=32, segment=16))
    work = workspace(state)
    sizes = []
    for num in (1, 3, 4, 5):
        attended(triton, state, list(range(num)), torch.randn(num, 4, 64).bfloat16())
        sizes.append(work.buffers["row_items"].numel())
    one = sizes[0]
    assert sizes == [one, 4 * one, 4 * one, 8 * one]
    assert work.num_requests(39) == 40


def test_buffers_that_are_outgrown_are_no_larger_together(triton):
    from diffkv.kernels.triton.workspace import workspace

    work = workspace(triton.place(make_state("k8v4")))
    for num in range(1, 200):
        work.buffer("some", torch.int32, num)
    assert sum(each.numel() for each in work.outgrown) < work.buffers["some"].numel() < 400


def test_a_warm_up_makes_what_all_requests_need(triton, monkeypatch):
    """No step makes a buffer anew, and a device without room says so before there are requests."""
    from diffkv.kernels.triton.workspace import Workspace, workspace

    state = triton.place(make_state("k8v4-k4v2", num_slots=40, max_tokens=64, segment=16, window=4))
    cache = DiffKVCache(state, triton.module, 1.0, segment=16)
    cache.warm_up(state.num_kv_heads * 2, 6)
    work = workspace(state)
    made = {name: buffer.data_ptr() for name, buffer in work.buffers.items()}
    query = torch.randn(6, state.num_kv_heads * 2, state.layout.head_dim).to(state.dtype)
    attended(triton, state, list(range(6)), query)
    assert made == {name: buffer.data_ptr() for name, buffer in work.buffers.items()}

    def full(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Workspace, "buffer", full)
    with pytest.raises(ConfigError, match="over 1 requests at once: lower max_num_seqs"):
        cache._decode_nobody(query[:1], query[:1, : state.num_kv_heads], 1)
