"""A prompt that exceeds its limit keeps nothing, attends as ever, and leaves the others alone."""

import pytest
import torch
from small_pool import HEAD_DIM, MAX_MODEL_LEN, NUM_KV_HEADS, NUM_LAYERS, make_state, tensors

from diffkv import ops, pool
from diffkv.cache import DiffKVCache, PromptChunk
from diffkv.policy import Thresholds

NOBODY = torch.empty(0, dtype=torch.int32)


def run(limit, slots):
    """Two prompts of the same batch, or one of them; the first may be limited."""
    torch.manual_seed(0)
    state = make_state("k8v4-k4v2", 256, 64)
    cache = DiffKVCache(state, ops.load("cpu", "reference"), 0.3)
    rows = len(slots) * MAX_MODEL_LEN
    packed = torch.randn(NUM_LAYERS, 3, 2 * MAX_MODEL_LEN, NUM_KV_HEADS, HEAD_DIM)
    packed = packed[:, :, MAX_MODEL_LEN * slots[0] :][:, :, :rows]
    chunks = []
    for i, slot in enumerate(slots):
        cache.open(slot, MAX_MODEL_LEN, Thresholds(2, 0), limit if slot == 0 else None)
        span = slice(i * MAX_MODEL_LEN, (i + 1) * MAX_MODEL_LEN)
        chunks.append(PromptChunk(slot, span, 0, MAX_MODEL_LEN))
    step = cache.plan(chunks, slice(0, 0), NOBODY, NOBODY)
    outputs = torch.zeros(NUM_LAYERS, rows, NUM_KV_HEADS, HEAD_DIM)
    for layer, (query, key, value) in enumerate(packed):
        cache.attend(layer, step, query, key, value, outputs[layer])
    pool.check_invariants(state)
    return cache, state, outputs


def held(state, slot):
    return int(pool.held_pages(state, torch.tensor([slot])))


def test_limit_is_kept_to_the_page():
    _, free, _ = run(None, [0, 1])
    pages = held(free, 0)
    for limit in range(pages + 2):
        cache, state, _ = run(limit, [0, 1])
        assert cache.over_limit(0) == (limit < pages)
        assert held(state, 0) == (0 if limit < pages else pages)
        assert not cache.over_limit(1)
        cache.close([0, 1])
        assert held(state, 0) == held(state, 1) == 0
        assert not cache.over_limit(0)


@pytest.mark.parametrize("limit", [1, 5])
def test_nobody_else_notices(limit):
    _, _, whole = run(None, [0, 1])
    _, both, outputs = run(limit, [0, 1])
    assert torch.equal(outputs, whole)
    _, alone, _ = run(None, [1])
    for name in ("num_tokens", "num_pages_held"):
        assert torch.equal(tensors(both)[name][1], tensors(alone)[name][1])
