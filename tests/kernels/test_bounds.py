"""Kernels reach nothing but the tensors that they are given, whatever they compute."""

import pytest
import torch
from backends import INTERPRETED, ints
from make import make_state

pytest.importorskip("triton")
import triton
import triton.language as tl
from bounds import OutOfBoundsError, in_bounds

from diffkv.cache import DiffKVCache, PromptChunk
from diffkv.policy import Thresholds
from diffkv.pool import check_invariants
from diffkv.rotation import signs

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is asked")

HEAD_DIM, GROUP = 32, 2
SEGMENT = 72  # more than one program scores


@pytest.fixture(autouse=True)
def bounds():
    with in_bounds():
        yield


@triton.jit
def _copy_kernel(x_ptr, out_ptr, first, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + first + i, mask=i < N - 1, other=0.0), mask=i >= 1)


@pytest.mark.parametrize(
    ("first", "message"), [(0, None), (-1, "1 of 7, load"), (2, "1 of 7, load")]
)
def test_what_is_outside_is_found(first, message):
    whole = torch.zeros(16)
    x, out = whole[4:12], torch.zeros(8)
    if message is None:
        _copy_kernel[(1,)](x, out, first, N=8)
        return
    with pytest.raises(Exception, match=message) as error:
        _copy_kernel[(1,)](x, out, first, N=8)
    assert OutOfBoundsError.__name__ in repr(error.value)


def whole_prefill(query, key, value, spans, scale, output):
    """`Prefill` that finds nothing out but says so: what kernels do with it is in bounds or not."""
    output.zero_()
    return torch.zeros(query.shape[1], len(query))


def no_lse(*args):
    whole_prefill(*args)


@pytest.mark.parametrize(
    ("quant", "prefill"), [("k8v8g1x2-k4v1", whole_prefill), ("k8v4-k4v2", no_lse)]
)
def test_requests_come_and_go(triton, quant, prefill):
    """Prompts whole and in chunks, some ending with a segment, in slots that were used before."""
    torch.manual_seed(0)
    state = make_state(
        quant, num_slots=24, max_tokens=5 * SEGMENT, head_dim=HEAD_DIM, segment=SEGMENT
    )
    cache = DiffKVCache(
        state, triton.module, 1.0, prefill=prefill, signs=signs(HEAD_DIM), segment=SEGMENT
    )
    cache.warm_up(state.num_kv_heads * GROUP)
    free = list(range(state.num_slots))
    for lens, chunk in (
        ([3 * SEGMENT], 999),
        ([SEGMENT, SEGMENT + 1, 7], 999),
        ([2 * SEGMENT + 90], 53),
    ):
        rows = {free.pop(0): length for length in lens}
        used = [*rows]
        for slot, length in rows.items():
            cache.open(slot, length, Thresholds(3.0, 0.0))
            used += prompt(cache, state, slot, length, chunk, free)
        for step in range(2):
            lens_now = ints(*(length + step + 1 for length in rows.values()))
            plan = cache.plan([], slice(0, len(rows)), ints(*rows), lens_now)
            attended(cache, state, plan, len(rows))
            numbers = torch.empty(1 + len(rows), 7, dtype=torch.int64)
            cache.report(ints(*rows), numbers)
        check_invariants(state)
        cache.release(used)
        free += used
        check_invariants(state)


def prompt(cache, state, slot, length, chunk, free):
    """Compute a prompt, and the slots of its closed rows."""
    closed, start, nobody = [], 0, ints()
    for first in range(0, length, chunk):
        stop = min(length, first + chunk)
        ends = cache.ends(slot).up_to(start, stop)
        closing = tuple(free.pop(0) for _ in ends)
        start, closed = ([start, *ends])[-1], [*closed, *closing]
        part = PromptChunk(slot, slice(0, stop - first), first, length, closing)
        attended(cache, state, cache.plan([part], slice(0, 0), nobody, nobody), stop - first)
    return closed


def attended(cache, state, step, num):
    heads = state.num_kv_heads
    qkv = torch.randn(num, heads * (GROUP + 2), HEAD_DIM).to(state.dtype)
    query, key, value = qkv.split([heads * GROUP, heads, heads], 1)
    for layer in range(state.num_layers):
        cache.attend(layer, step, query, key, value, torch.empty_like(query))
