"""What only a GPU shows: nothing waits for it, graphs do what eager steps do, times mean something.

    pytest -m gpu

The operations themselves are compared with the reference in tests/kernels, on a GPU where there is one.
"""

import dataclasses
from itertools import accumulate

import pytest
import torch

from diffkv import ops, pool
from diffkv.cache import DiffKVCache
from diffkv.lab.bench import attention, fill
from diffkv.lab.bench import pool as bench_pool
from diffkv.lab.bench.attention import Grid
from diffkv.lab.provenance import collect
from diffkv.lab.rows import Writer
from diffkv.lab.timing import Case, Stopwatch, capture, measure, peak_gb_per_s, stream_case
from diffkv.policy import Thresholds
from diffkv.rotation import signs
from diffkv.state import NewTokens
from diffkv.steps import PromptChunk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPE, HEAD_DIM, HEADS = torch.bfloat16, 128, 8
QUANT = "k8v4-k4v2"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def moved(state, device):
    """A copy of a pool in a device's memory."""
    tensors = {
        field.name: value.to(device, copy=True)
        for field in dataclasses.fields(state)
        if isinstance(value := getattr(state, field.name), torch.Tensor)
    }
    return dataclasses.replace(state, **tensors)


def assert_same(state, expected):
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(expected, field.name)), field.name


def filled(layers, batch, num, spare):
    """A pool on the GPU: prompts of `num` tokens, a fifth of them high, and room for `spare` more."""
    state = fill.make_pool(QUANT, HEAD_DIM, DTYPE, (layers, HEADS), batch, num + spare, "cuda")
    tokens = fill.random_tokens([num] * batch, HEADS, HEAD_DIM, DTYPE, "cuda")
    fill.fill(state, ops.load("cuda"), tokens, high_share=0.2)
    state.thresholds[:, 0] = 3.0
    return state


@pytest.mark.parametrize("rotate", [False, True])
def test_no_layer_of_a_prompt_waits_for_the_gpu(rotate):
    """Two steps of prompts, in chunks and whole; outputs are those of plain torch on the CPU."""
    batches = ([(0, 0, 300, 300), (1, 0, 100, 200)], [(2, 0, 150, 150), (1, 100, 200, 200)])
    rows = [sum(end - start for _, start, end, _ in batch) for batch in batches]
    vectors = [torch.randn(n, heads, HEAD_DIM).to(DTYPE) for n in rows for heads in (4, 2, 2)]
    outputs = []
    for device in ("cpu", "cuda"):
        state = fill.make_pool(QUANT, HEAD_DIM, DTYPE, (1, 2), 3, 512, device)
        chosen = signs(HEAD_DIM).to(device) if rotate else None
        operations = ops.load(device, "reference" if device == "cpu" else None)
        cache = DiffKVCache(state, operations, HEAD_DIM**-0.5, signs=chosen)
        cache.warm_up(4)
        for slot, length in enumerate((300, 200, 150)):
            cache.open(slot, length, Thresholds(3.0, 0.0))
        inputs = iter([vector.to(device) for vector in vectors])
        results = [torch.empty(n, 4, HEAD_DIM, dtype=DTYPE, device=device) for n in rows]
        none = torch.empty(0, dtype=torch.int32, device=device)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            for batch, result in zip(batches, results, strict=True):
                ends = accumulate(end - start for _, start, end, _ in batch)
                chunks = [
                    PromptChunk(slot, slice(row - (end - start), row), start, length)
                    for row, (slot, start, end, length) in zip(ends, batch, strict=True)
                ]
                step = cache.plan(chunks, slice(0, 0), none, none)
                cache.attend(0, step, next(inputs), next(inputs), next(inputs), result)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        outputs.append(torch.cat(results).cpu().float())
    assert float((outputs[0] - outputs[1]).abs().max()) < 0.05


def test_a_decode_step_in_a_graph_does_what_eager_steps_do():
    layers, batch, num, group, steps = 8, 32, 700, 4, 20
    kernels = ops.load("cuda")
    state = filled(layers, batch, num, spare=2 * steps)
    eager = moved(state, "cuda")
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    key = torch.randn(layers, batch, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    query = torch.randn(layers, batch, HEADS * group, HEAD_DIM, dtype=DTYPE, device="cuda")
    outputs = [torch.empty_like(query) for _ in range(2)]
    lengths = [torch.full((batch,), num, dtype=torch.int32, device="cuda") for _ in range(2)]

    def step(state, lengths, output):
        lengths.add_(1)
        plan = kernels.plan_decode(state, slots, lengths)
        for layer in range(layers):
            new = NewTokens(plan, key[layer], key[layer])
            scaled = query[layer], HEAD_DIM**-0.5, output[layer]
            kernels.attend(state, layer, slots, *scaled, None, new)

    for mine, lens, output in ((state, lengths[0], outputs[0]), (eager, lengths[1], outputs[1])):
        step(mine, lens, output)  # compiled and with its buffers, before it is captured
    replay, _ = capture(lambda: step(state, lengths[0], outputs[0]))
    for _ in range(steps):
        replay()
        step(eager, lengths[1], outputs[1])
        torch.cuda.synchronize()
        assert torch.equal(*outputs), "outputs of graph and eager steps differ"
    assert_same(state, eager)
    there = moved(state, "cpu")
    pool.check_invariants(there)
    numbers = torch.empty(1 + batch, 7, dtype=torch.int64, device="cuda")
    kernels.report(state, slots, numbers)
    expected = torch.empty(numbers.shape, dtype=torch.int64)
    ops.load("cpu", "reference").report(there, slots.cpu(), expected)
    assert torch.equal(numbers.cpu(), expected)


def test_parts_that_a_stopwatch_times_do_their_work_once():
    """A pool whose steps are timed, from graphs after the first, is as one whose steps are not."""
    kernels, watch = ops.load("cuda"), Stopwatch("cuda")
    timed = filled(2, 4, 100, spare=20)
    eager = moved(timed, "cuda")
    slots = torch.arange(4, dtype=torch.int32, device="cuda")
    key = torch.randn(4, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    for index in range(10):
        lengths = torch.full_like(slots, 101 + index)
        for state, time in ((timed, watch.time), (eager, lambda _, call: call())):
            plan = time("plan", lambda s=state, n=lengths: kernels.plan_decode(s, slots, n))
            for layer in range(2):
                time(
                    "append",
                    lambda s=state, p=plan, at=layer: kernels.append(s, at, p, key, key),
                )
    assert_same(timed, eager)
    assert {name: 0 < each.ms < 10 for name, each in watch.timings().items()} == {
        "plan": True,
        "append": True,
    }


def test_a_copy_nears_the_peak_and_never_passes_it():
    stream = stream_case("cuda")
    source, target = stream.run.args
    target.zero_()
    (timing,) = measure([stream], repeats=10, device="cuda")
    assert torch.equal(source, target)
    assert 0.6 < stream.num_bytes / timing.ms / 1e6 / peak_gb_per_s("cuda") <= 1.0


def test_a_time_is_that_of_the_device():
    """Twice the work takes about twice the time, and what Python does is in neither."""
    data = torch.ones(256 << 20, dtype=torch.uint8, device="cuda")
    once, twice = measure(
        [
            Case("once", lambda: data.add_(1), 1),
            Case("twice", lambda: (data.add_(1), data.add_(1)), 1),
        ],
        repeats=10,
        device="cuda",
    )
    assert 1.7 < twice.ms / once.ms < 2.3


def test_rows_of_attention_and_of_the_pool():
    writer = Writer(collect("cuda"))
    grid = Grid([QUANT, "k16v16"], ["high", "mix"], [1024], [2], [4], [False, True], repeats=3)
    attention.run(grid, "cuda", writer)
    assert all(0 < row["peak_share"] < row["copy_share"] for row in writer.rows)
    assert {row["quant"] for row in writer.rows} >= {QUANT, "k16v16"}
    bench_pool.run(
        bench_pool.Contents(QUANT, 4, 8, 2), "cuda", writer, steps=3, full=False, small=True
    )
    operations = {row["op"] for row in writer.rows if row.kind == "pool"}
    assert operations >= {"plan_decode", "append", "significance", "store_prompt", "gather"}
