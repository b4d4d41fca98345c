"""Correctness and speed of the Triton kernels on one GPU, without vLLM.

    PYTHONPATH=src python benchmarks/gpu.py --out DIR --minutes 8

First every operation against the reference, then attention against torch in float32, then timings: the
most important rows first, the others as long as there is time. Times are medians over CUDA-graph
replays with a cold L2 cache, with 20/80 percentiles. GB/s counts useful bytes (codes, scales, zeros of
kept tokens); `share` is of the bandwidth of a streaming copy in the same run. One JSON line a row.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/kernels"))
from make import TABLES, assert_same, copy_of, make_state, make_sums, make_tiers, make_tokens

from diffkv import ops, pool, reference
from diffkv.cache import DiffKVCache
from diffkv.kernels import triton as kernels
from diffkv.kernels.triton.workspace import Tuning, workspace
from diffkv.layout import CacheLayout, PageLayout
from diffkv.policy import Thresholds
from diffkv.quant import LayerQuant, QuantConfig
from diffkv.rotation import signs
from diffkv.state import PoolState, PromptTokens
from diffkv.steps import PromptChunk

HEADS, HEAD_DIM, DTYPE = 8, 128, torch.bfloat16
FLUSH_BYTES = 256 << 20
MIXED_HIGH = 0.2

SWEEP = tuple(
    Tuning(num_stages=s, programs=p, tile=t, max_registers=r)
    for s, p, t, r in (
        (5, 8, None, None), (5, 12, None, 168), (3, 12, 64, 168),
    )
)  # fmt: skip


class Report:
    """Rows to a file and to the terminal, as they come."""

    def __init__(self, out: Path, minutes: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "gpu.jsonl").open("w")
        self.end = time.monotonic() + minutes * 60
        self.facts = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "triton": triton.__version__,
            "commit": os.environ.get("DIFFKV_COMMIT") or commit(),
        }  # fmt: skip
        self.rows: list[dict] = []
        print(self.facts, flush=True)

    def has_time(self, seconds: float = 0) -> bool:
        return time.monotonic() + seconds < self.end

    def row(self, **row) -> None:
        self.rows.append(row)
        self.file.write(json.dumps(row | self.facts) + "\n")
        self.file.flush()
        print("  ".join(f"{k} {shown(v)}" for k, v in row.items()), flush=True)


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def commit() -> str:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measure(fn, reps: int = 40, graph: bool = True) -> dict[str, float]:
    """Milliseconds of a call: median and 20/80 percentiles, L2 cold."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    call = fn
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            fn()
        call = captured.replay
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(reps)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    return {
        "ms": statistics.median(times), "ms_p20": times[reps // 5], "ms_p80": times[-reps // 5]
    }  # fmt: skip


# Correctness ------------------------------------------------------------------------------------


def on_gpu(state: PoolState) -> PoolState:
    return dataclasses.replace(state, **{name: getattr(state, name).cuda() for name in TABLES})


def on_cpu(state: PoolState) -> PoolState:
    return dataclasses.replace(state, **{name: getattr(state, name).cpu() for name in TABLES})


def tokens_on_gpu(tokens: PromptTokens) -> PromptTokens:
    return PromptTokens(*(getattr(tokens, f.name).cuda() for f in dataclasses.fields(tokens)))


def check_vectors() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_dim in (64, 80, 128, 256):
            x = (torch.randn(70, head_dim) * 3).to(dtype)
            x[-1], x[-2, 0], x[-3, 1] = 1.5, float("nan"), float("inf")
            for bits in (1, 2, 4, 8):
                for groups in (1, 2, 4):
                    codes, meta = kernels.quantize(x.cuda(), bits, groups)
                    want_codes, want_meta = reference.quantize(x, bits, groups)
                    assert torch.equal(meta.cpu(), want_meta), f"meta {dtype} {head_dim} {bits}"
                    assert torch.equal(codes.cpu(), want_codes), f"codes {dtype} {head_dim} {bits}"
                    got = kernels.dequantize(codes, meta, bits, dtype).cpu()
                    want = reference.dequantize(want_codes, want_meta, bits, dtype)
                    assert torch.equal(got, want), f"dequantize {dtype} {head_dim} {bits}"


def check_life(
    quant: str, head_dim: int, dtype: torch.dtype, group: int, drops: bool
) -> dict[str, float]:
    """A few requests from prompt to release: bytes equal, outputs and sums close."""
    expected = make_state(quant, head_dim, dtype, num_layers=2, max_tokens=120, drops=drops)
    expected.prompt_lens.copy_(torch.tensor([70, 33, 5]))
    expected.thresholds[:, 0] = 3.0 if expected.layout.low else 1.0
    expected.thresholds[:, 1] = 1.0 if drops else 0.0
    expected.pages.copy_(torch.randint(0, 256, expected.pages.shape, dtype=torch.uint8))
    state = on_gpu(expected)
    for layer in range(2):
        tokens = make_tokens(expected, [0, -1, 2, 1], [70, 7, 5, 33])
        tiers, sums = make_tiers(expected, 115), make_sums(expected, 115)
        kernels.store_prompt(state, layer, tokens_on_gpu(tokens), tiers.cuda(), sums.cuda())
        reference.store_prompt(expected, layer, tokens, tiers, sums)
    assert_same(on_cpu(state), expected)
    for got, want in zip(
        kernels.gather(state, 1, 0, 71), reference.gather(expected, 1, 0, 71), strict=True
    ):
        assert torch.equal(got.cpu(), want), "gather"
    worst_output = worst_sum = 0.0
    for i in range(6):
        slots = torch.tensor([0, -1, 2, 1], dtype=torch.int32)
        lens = torch.tensor([71 + i, 3, 6 + i, 34 + i], dtype=torch.int32)
        plan = kernels.plan_decode(state, slots.cuda(), lens.cuda())
        expected_plan = reference.plan_decode(expected, slots, lens)
        assert torch.equal(plan.places.cpu(), expected_plan.places), "places"
        for layer in range(2):
            key = torch.randn(4, 2, head_dim).to(dtype)
            value = torch.randn(4, 2, head_dim).to(dtype)
            query = torch.randn(4, 2 * group, head_dim).to(dtype)
            kernels.append(state, layer, plan, key.cuda(), value.cuda())
            reference.append(expected, layer, expected_plan, key, value)
            assert_same(on_cpu(state), expected)
            output, want = torch.full_like(query, torch.nan).cuda(), torch.empty_like(query)
            kernels.attend(state, layer, slots.cuda(), query.cuda(), head_dim**-0.5, output)
            reference.attend(expected, layer, slots, query, head_dim**-0.5, want)
            difference = (output.cpu().float() - want.float()).norm() / want.float().norm()
            worst_output = max(worst_output, float(difference))
            worst_sum = max(worst_sum, sum_error(on_cpu(state), expected))
            state.pages.copy_(expected.pages)  # from the same sums on, the same decisions
    everything = torch.tensor([2, 0, 1], dtype=torch.int32)
    kernels.release(state, everything.cuda(), -1)
    reference.release(expected, everything, -1)
    assert_same(on_cpu(state), expected)
    limit = 1e-4 if dtype is torch.float32 else 6e-3
    assert worst_output < limit and worst_sum < 2e-3, (quant, worst_output, worst_sum)
    return {"output_error": worst_output, "sum_error": worst_sum}


def sum_error(state: PoolState, expected: PoolState) -> float:
    """Largest difference of two pools whose pages differ in significance sums only."""
    different = (state.pages != expected.pages).nonzero()
    worst = 0.0
    allowed = torch.zeros(state.layout.page_bytes, dtype=torch.bool)
    for tier in state.layout.tiers:
        allowed[tier.sums : tier.positions] = True
    for page in different[:, 0].unique().tolist():
        for tier in state.layout.tiers:
            got = state.pages[page, tier.sums : tier.positions].view(torch.float32)
            want = expected.pages[page, tier.sums : tier.positions].view(torch.float32)
            close = (got - want).abs()
            worst = max(worst, float(close[want.abs() < 1e3].nan_to_num(0).max()))
            break
    assert allowed[different[:, 1]].all(), "bytes beside the sums differ"
    return worst


def check_significance() -> float:
    lens, query_lens = [300, 1, 70], [80, 1, 70]
    query, key = torch.randn(151, 8, 128).bfloat16(), torch.randn(371, 2, 128).bfloat16()
    starts = [
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (query_lens, lens)
    ]
    want = reference.significance(query, key, *starts, 128**-0.5, 64)
    cuda = (x.cuda() for x in (query, key, *starts))
    error = float((kernels.significance(*cuda, 128**-0.5, 64).cpu() - want).abs().max())
    assert error < 1e-3, error
    return error


def check_prompts_without_waiting(rotate: bool) -> float:
    """Two steps of prompts, in chunks and whole, in which no layer may wait for the GPU.

    Returns:
        The largest difference of the outputs from those of the operations in plain torch, on the CPU.
    """
    batches = ([(0, 0, 300, 300), (1, 0, 100, 200)], [(2, 0, 150, 150), (1, 100, 200, 200)])
    rows = [sum(end - start for _, start, end, _ in batch) for batch in batches]
    shapes = [(n, heads, HEAD_DIM) for n in rows for heads in (4, 2, 2)]
    vectors = [torch.randn(shape).to(DTYPE) for shape in shapes]
    outputs = []
    for device in ("cpu", "cuda"):
        layout = CacheLayout.derive(LayerQuant.parse("k8v4-k4v2"), 1, HEAD_DIM)
        shape = pool.CacheShape.fit(8 << 20, layout, 2, 512, 3)
        buffer = torch.zeros(8 << 20, dtype=torch.uint8, device=device)
        state = pool.create_cache(shape, buffer, DTYPE, window=64)
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
        for batch, result in zip(batches, results, strict=True):
            ends = accumulate(end - start for _, start, end, _ in batch)
            chunks = [
                PromptChunk(slot, slice(row - (end - start), row), start, length)
                for row, (slot, start, end, length) in zip(ends, batch, strict=True)
            ]
            step = cache.plan(chunks, slice(0, 0), none, none)
            cache.attend(0, step, next(inputs), next(inputs), next(inputs), result)
        torch.cuda.set_sync_debug_mode("default")
        outputs.append(torch.cat(results).cpu().float())
    error = float((outputs[0] - outputs[1]).abs().max())
    assert error < 0.05, error
    return error


def checks(report: Report) -> None:
    torch.manual_seed(0)
    check_vectors()
    print("quantize, dequantize: bit-exact", flush=True)
    report.row(check="significance", sum_error=check_significance())
    for rotate in (False, True):
        error = check_prompts_without_waiting(rotate)
        report.row(check="prompts, nothing waits", rotate=rotate, output_error=error)
    for quant, head_dim, dtype, group in (
        ("k8v4-k4v2", 128, torch.bfloat16, 4), ("k8v4g1x2-k4v2g2x4", 80, torch.float16, 3),
        ("k16v16", 128, torch.bfloat16, 8), ("k8v2-k2v1g1x4", 64, torch.float32, 16),
        ("k8v8", 256, torch.bfloat16, 1), ("k4v1", 96, torch.float16, 2),
        ("k8v2", 128, torch.bfloat16, 8), ("k16v16", 64, torch.float32, 2),
    ):  # fmt: skip
        for drops in (False, True):
            report.row(
                check=quant,
                head_dim=head_dim,
                dtype=str(dtype),
                drops=drops,
                **check_life(quant, head_dim, dtype, group, drops),
            )


# Timings ----------------------------------------------------------------------------------------


def filled(
    quant: str,
    lens: list[int],
    high: float,
    num_layers: int = 1,
    spare: int = 64,
    drops: bool = False,
) -> PoolState:
    """A pool on the GPU with random tokens, a share of them high."""
    layout = PageLayout.derive(QuantConfig.parse(quant), HEAD_DIM, None, DTYPE.itemsize, drops)
    width = layout.max_pages(max(lens) + spare)
    shares = (1.0,) if layout.low is None else (high, 1 - high)
    pages = sum(
        HEADS * (-(-int(n * share * 1.05 + 64) // tier.tokens_per_page) + 2)
        for n in lens
        for share, tier in zip(shares, layout.tiers, strict=True)
    )
    num_pages = num_layers * (pages + len(lens) * HEADS * spare // 16)
    shape = pool.PoolShape(layout, num_layers, HEADS, len(lens), width, num_pages)
    buffer = torch.empty(
        shape.table_bytes + num_pages * layout.page_bytes, dtype=torch.uint8, device="cuda"
    )
    state = pool.create(shape, buffer, DTYPE, 64)
    state.prompt_lens.copy_(torch.tensor(lens))
    for layer in range(num_layers):
        for slot, n in enumerate(lens):
            tiers = torch.full((HEADS, n), len(shares) - 1, dtype=torch.int8, device="cuda")
            if layout.low is not None:
                tiers[torch.rand(HEADS, n, device="cuda") < high] = 0
            tokens = PromptTokens(
                torch.tensor([slot], dtype=torch.int32).cuda(),
                torch.tensor([0, n], dtype=torch.int32).cuda(),
                torch.randn(n, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda"),
                torch.randn(n, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda"),
                torch.arange(n, dtype=torch.int32, device="cuda"),
            )
            sums = torch.rand(HEADS, n, device="cuda")
            kernels.store_prompt(state, layer, tokens, tiers, sums)
    assert int(state.overruns) == 0, "the pool was made too small"
    return state


def useful_bytes(state: PoolState) -> int:
    kept = state.num_tokens.sum((0, 1, 2)).tolist()
    bytes_each = (t.token_bytes - 8 for t in state.layout.tiers)  # without sum and position
    return sum(n * b for n, b in zip(kept, bytes_each, strict=False))


def ragged(batch: int, context: int) -> list[int]:
    """Lengths 4:1 with the same total as `batch` requests of `context`."""
    long = min(batch, -(-batch // 2))
    short = context * 2 // 5
    return [short * 4 if i < long else short for i in range(batch)] if batch > 1 else [context]


def attention_error(state: PoolState, query: Tensor, output: Tensor, context: int) -> float:
    """Against float32 attention over what is stored, of one request."""
    key, value, _, tiers = kernels.gather(state, 0, 0, context)
    group = query.shape[1] // HEADS
    q = query[0].float().view(HEADS, group, HEAD_DIM)
    scores = (q @ key.float().transpose(1, 2)) * HEAD_DIM**-0.5
    scores = scores.masked_fill((tiers == 2)[:, None], float("-inf"))
    want = (scores.softmax(-1) @ value.float()).view(-1, HEAD_DIM)
    return float((output[0].float() - want).norm() / want.norm())


def attend_row(
    report: Report, quant: str, lens: list[int], group: int, copy: float, high: float = MIXED_HIGH,
    kind: str = "uniform", tunings: tuple[Tuning, ...] = (Tuning(),),
) -> Tuning:  # fmt: skip
    state = filled(quant, lens, high)
    batch = len(lens)
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    query = torch.randn(batch, HEADS * group, HEAD_DIM, dtype=DTYPE, device="cuda")
    output = torch.full_like(query, torch.nan)
    work, best = workspace(state), (float("inf"), tunings[0])
    num_bytes = useful_bytes(state)
    for tuning in tunings:
        if len(tunings) > 1 and not report.has_time(20):
            break
        work.tuning = tuning
        try:
            kernels.attend(state, 0, slots, query, HEAD_DIM**-0.5, output)
            error = attention_error(state, query, output, max(lens))
            assert error < 1e-2, f"attend is wrong: {error}"
            times = measure(lambda: kernels.attend(state, 0, slots, query, HEAD_DIM**-0.5, output))
        except (triton.OutOfResources, triton.CompilationError) as failure:
            print(quant, tuning, "does not fit:", failure, flush=True)
            continue
        rate = num_bytes / times["ms"] / 1e6
        report.row(
            op="attend", quant=quant, high=high, batch=batch, context=sum(lens) // batch, kind=kind,
            group=group, **times, gbs=rate, share=rate / copy, error=error,
            bytes=num_bytes, tuning=dataclasses.astuple(tuning),
        )  # fmt: skip
        best = min(best, (times["ms"], tuning), key=lambda x: x[0])
    return best[1]


@triton.jit
def _dense_kernel(
    q_ptr, k_ptr, v_ptr, partial_ptr, lse_ptr, n, scale,
    G: tl.constexpr, D: tl.constexpr, B: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Baseline: plain split-KV decode attention over dense bf16 K and V [batch * heads, n, D]."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    g = tl.arange(0, 16)
    d = tl.arange(0, D)
    in_group = (g < G)[:, None]
    q = tl.load(q_ptr + (row * G + g)[:, None] * D + d[None, :], mask=in_group, other=0.0)
    each = tl.cdiv(tl.cdiv(n, SPLITS), B) * B
    most = tl.full([16], -1.0e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    sums = tl.zeros([16, D], tl.float32)
    for start in range(split * each, tl.minimum(split * each + each, n), B):
        t = start + tl.arange(0, B)
        at = (row * n + t)[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at, mask=(t < n)[:, None], other=0.0).to(q.dtype)
        scores = tl.where((t < n)[None, :], tl.dot(q, tl.trans(k)) * scale, -1.0e30)
        new_most = tl.maximum(most, tl.max(scores, 1))
        decay = tl.exp2(most - new_most)
        p = tl.exp2(scores - new_most[:, None])
        most = new_most
        total = total * decay + tl.sum(p, 1)
        v = tl.load(v_ptr + at, mask=(t < n)[:, None], other=0.0).to(q.dtype)
        sums = sums * decay[:, None] + tl.dot(p.to(v.dtype), v)
    out = ((row * SPLITS + split) * 16 + g).to(tl.int64)
    tl.store(partial_ptr + out[:, None] * D + d[None, :], sums / tl.maximum(total, 1e-20)[:, None])
    tl.store(lse_ptr + out, most + tl.log2(tl.maximum(total, 1e-20)))


@triton.jit
def _dense_merge_kernel(
    partial_ptr, lse_ptr, out_ptr, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    at = (row * SPLITS + tl.arange(0, SPLITS)) * 16 + g
    lse = tl.load(lse_ptr + at)
    weight = tl.exp2(lse - tl.max(lse, 0))
    d = tl.arange(0, D)
    partial = tl.load(partial_ptr + at[:, None] * D + d[None, :])
    out = tl.sum(partial * (weight / tl.sum(weight, 0))[:, None], 0)
    tl.store(out_ptr + (row * G + g) * D + d, out.to(out_ptr.dtype.element_ty))


def dense_rows(report: Report, batch: int, context: int, group: int, copy: float) -> None:
    """Baselines over dense bf16 K and V."""
    num_bytes = 2 * batch * HEADS * context * HEAD_DIM * 2
    k = torch.randn(batch * HEADS, context, HEAD_DIM, dtype=DTYPE, device="cuda")
    v = torch.randn_like(k)
    q = torch.randn(batch * HEADS, group, HEAD_DIM, dtype=DTYPE, device="cuda")
    splits = max(1, min(32, 1024 // (batch * HEADS)))
    splits = 1 << (splits.bit_length() - 1)
    partial = torch.empty(batch * HEADS * splits * 16, HEAD_DIM, device="cuda")
    lse, out = torch.empty(batch * HEADS * splits * 16, device="cuda"), torch.empty_like(q)
    scale = HEAD_DIM**-0.5

    def dense(k=k, v=v):
        _dense_kernel[(batch * HEADS, splits)](
            q, k, v, partial, lse, context, scale * 1.4426950408889634, group, HEAD_DIM, 64, splits,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        _dense_merge_kernel[(batch * HEADS, group)](partial, lse, out, group, HEAD_DIM, splits)

    def sdpa():
        shape = (batch, HEADS, -1, HEAD_DIM)  # the group as queries: one read serves all of them
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(
                q.view(shape), k.view(shape), v.view(shape), scale=scale
            )

    want = ((q[:8].float() @ k[:8].float().transpose(1, 2)) * scale).softmax(-1) @ v[:8].float()
    dense()
    error = float((out[:8].float() - want).norm() / want.norm())
    assert error < 1e-2, f"the dense baseline is wrong: {error}"
    fp8 = tuple(x.to(torch.float8_e4m3fn) for x in (k, v))
    for name, fn, total in (
        ("bf16 dense triton", dense, num_bytes), ("bf16 sdpa flash", sdpa, num_bytes),
        ("fp8 dense triton", lambda: dense(*fp8), num_bytes // 2),
    ):  # fmt: skip
        times = measure(fn)
        rate = total / times["ms"] / 1e6
        report.row(
            op="attend", quant=name, batch=batch, context=context, kind="uniform",
            group=group, **times, gbs=rate, share=rate / copy, bytes=total,
        )  # fmt: skip


@triton.jit
def _copy_kernel(in_ptr, out_ptr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(out_ptr + at, tl.load(in_ptr + at))


@triton.jit
def _read_kernel(in_ptr, out_ptr, B: tl.constexpr, BLOCKS: tl.constexpr):
    total = tl.zeros([B], tl.int32)
    for block in range(BLOCKS):
        at = (tl.program_id(0).to(tl.int64) * BLOCKS + block) * B + tl.arange(0, B)
        total += tl.load(in_ptr + at)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def copy_row(report: Report) -> float:
    """The bandwidth that shares are of: a streaming copy by Triton, bytes read and written."""
    block, blocks = 1024, 8
    a = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    b = torch.empty_like(a)
    programs = a.numel() // block
    rates = {}
    for name, num_bytes, fn in (
        ("copy", 2 * a.nbytes, lambda: _copy_kernel[(programs,)](a, b, block)),
        ("read", a.nbytes, lambda: _read_kernel[(programs // blocks,)](a, b, block, blocks)),
        ("torch copy", 2 * a.nbytes, lambda: b.copy_(a)),
    ):
        times = measure(fn, reps=20)
        rates[name] = num_bytes / times["ms"] / 1e6
        report.row(op=name, **times, gbs=rates[name])
    return rates["copy"]


def prompt_rows(report: Report, copy: float) -> None:
    """store_prompt and significance of long prompts."""
    for quant in ("k8v4-k4v2", "k8v4", "k16v16"):
        for num in (4096, 32768):
            state = filled(quant, [1], MIXED_HIGH, spare=num * 2)
            slots = torch.zeros(1, dtype=torch.int32, device="cuda")
            key = torch.randn(num, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
            tokens = PromptTokens(
                slots, torch.tensor([0, num], dtype=torch.int32).cuda(), key, torch.randn_like(key),
                torch.arange(num, dtype=torch.int32).cuda(),
            )  # fmt: skip
            tiers = torch.zeros(HEADS, num, dtype=torch.int8, device="cuda")
            sums = torch.rand(HEADS, num, device="cuda")

            def store(state=state, tokens=tokens, tiers=tiers, sums=sums, slots=slots):
                kernels.store_prompt(state, 0, tokens, tiers, sums)
                kernels.release(state, slots, 0)

            times = measure(store, reps=20)
            rate = 2 * key.nbytes / times["ms"] / 1e6
            report.row(
                op="store_prompt+release",
                quant=quant,
                context=num,
                **times,
                gbs=rate,
                share=rate / copy,
            )
    for num in (4096, 32768):
        key = torch.randn(num, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
        query = torch.randn(64, HEADS * 4, HEAD_DIM, dtype=DTYPE, device="cuda")
        starts = [torch.tensor([0, n], dtype=torch.int32).cuda() for n in (64, num)]
        times = measure(
            lambda q=query, k=key, s=starts: kernels.significance(q, k, *s, 0.1, 64), reps=20
        )
        rate = key.nbytes / times["ms"] / 1e6
        report.row(op="significance", context=num, group=4, **times, gbs=rate, share=rate / copy)


def plan_rows(report: Report) -> None:
    """plan_decode and release at 32 layers x 8 heads x 256 requests."""
    layers, requests, num = 32, 256, 256
    state = one_call_pool(layers, requests, num)
    slots = torch.arange(requests, dtype=torch.int32, device="cuda")
    for name, alphas in (("no thresholds", (0.0, 0.0)), ("thresholds", (3.0, 1.0))):
        state.thresholds[:, 0], state.thresholds[:, 1] = alphas
        lens = torch.full((requests,), num + 1, dtype=torch.int32, device="cuda")
        times = measure(lambda lens=lens: kernels.plan_decode(state, slots, lens), reps=20)
        report.row(
            op="plan_decode",
            kind=name,
            layers=layers,
            heads=HEADS,
            batch=requests,
            context=num,
            **times,
        )
    kept = {n: getattr(state, n).clone() for n in TABLES if n != "pages"}
    for batch in (1, 256):
        some = slots[:batch].contiguous()
        times = []
        for _ in range(8):
            for name, tensor in kept.items():
                getattr(state, name).copy_(tensor)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            kernels.release(state, some, -1)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        report.row(
            op="release",
            layers=layers,
            heads=HEADS,
            batch=batch,
            context=num,
            ms=statistics.median(times[2:]),
        )
    assert int(state.overruns) == 0


def one_call_pool(layers: int, requests: int, num: int) -> PoolState:
    """`requests` prompts of `num` tokens, 40 % of them high, in every layer."""
    quant = QuantConfig.parse("k8v4-k4v2")
    layout = PageLayout.derive(quant, HEAD_DIM, None, DTYPE.itemsize, drops=True)
    width = layout.max_pages(num + 200)
    num_pages = layers * requests * HEADS * width * 3 // 4
    shape = pool.PoolShape(layout, layers, HEADS, requests, width, num_pages)
    buffer = torch.empty(
        shape.table_bytes + num_pages * layout.page_bytes, dtype=torch.uint8, device="cuda"
    )
    state = pool.create(shape, buffer, DTYPE, 64)
    state.prompt_lens.fill_(num)
    total = requests * num
    tokens = PromptTokens(
        torch.arange(requests, dtype=torch.int32, device="cuda"),
        torch.arange(0, total + 1, num, dtype=torch.int32, device="cuda"),
        torch.randn(total, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda"),
        torch.randn(total, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda"),
        torch.arange(num, dtype=torch.int32, device="cuda").repeat(requests),
    )
    tiers = (torch.rand(HEADS, total, device="cuda") > 0.4).to(torch.int8)
    for layer in range(layers):
        kernels.store_prompt(state, layer, tokens, tiers, torch.rand(HEADS, total, device="cuda"))
    assert int(state.overruns) == 0
    return state


def graph_row(report: Report) -> None:
    """A whole decode step in a CUDA graph gives what the same steps give one by one."""
    layers, batch, num, group, steps = 8, 32, 700, 4, 20
    state = filled("k8v4-k4v2", [num] * batch, 0.4, num_layers=layers, spare=128, drops=True)
    state.thresholds[:, 0], state.thresholds[:, 1] = 3.0, 1.0
    eager = copy_of(state)
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    key = torch.randn(layers, batch, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    query = torch.randn(layers, batch, HEADS * group, HEAD_DIM, dtype=DTYPE, device="cuda")
    outputs = [torch.empty_like(query) for _ in range(2)]
    lens = [torch.full((batch,), num, dtype=torch.int32, device="cuda") for _ in range(2)]

    def step(state, lens, output):
        lens.add_(1)
        plan = kernels.plan_decode(state, slots, lens)
        for layer in range(layers):
            kernels.append(state, layer, plan, key[layer], key[layer])
            kernels.attend(state, layer, slots, query[layer], HEAD_DIM**-0.5, output[layer])

    warm = copy_of(state)
    step(warm, lens[0].clone(), outputs[0].clone())
    work = workspace(state)  # as a warm-up step would leave it, without a step having been made
    for name, buffer in workspace(warm).buffers.items():
        work.buffers[name] = torch.empty_like(buffer)
    del warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(state, lens[0], outputs[0])
    times = []
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        step(eager, lens[1], outputs[1])
        torch.cuda.synchronize()
        assert torch.equal(outputs[0], outputs[1]), "graph and eager steps differ"
        times.append(start.elapsed_time(end))
    assert_same(on_cpu(state), on_cpu(eager))
    pool.check_invariants(on_cpu(state))
    report.row(op="decode step in a graph", layers=layers, batch=batch, context=num, group=group,
               steps=steps, ms=statistics.median(times))  # fmt: skip


def timings(report: Report, sweep: bool) -> None:
    copy = copy_row(report)
    free = torch.cuda.mem_get_info()[0]
    dense_rows(report, 32, 16384, 4, copy)
    main = {}
    for quant in ("k8v4", "k4v2", "k8v4-k4v2", "k8v8", "k4v4", "k16v16"):
        tunings = SWEEP if sweep else SWEEP[:1]
        main[quant] = attend_row(report, quant, [16384] * 32, 4, copy, tunings=tunings)
    attend_row(
        report,
        "k8v4-k4v2",
        ragged(32, 16384),
        4,
        copy,
        kind="ragged 4:1",
        tunings=(main["k8v4-k4v2"],),
    )
    graph_row(report)
    plan_rows(report)
    torch.cuda.empty_cache()
    grid = [
        (context, batch)
        for context, batch in (
            (65536, 8), (4096, 128), (16384, 8), (65536, 1), (16384, 1), (4096, 32), (1024, 128),
            (1024, 32), (4096, 8), (16384, 128), (65536, 32), (1024, 8), (4096, 1), (1024, 1),
        )
        if context * batch * HEADS * HEAD_DIM * 4 * 1.4 < free
    ]  # fmt: skip
    prompts_done = False
    for group in (4, 8):
        if group == 8:
            grid = [(16384, 32), *grid]
        for context, batch in grid:
            if not report.has_time(25):
                return
            dense_rows(report, batch, context, group, copy)
            for quant in ("k8v4-k4v2", "k8v4", "k4v2", "k4v4", "k8v8", "k16v16"):
                if report.has_time(10):
                    attend_row(
                        report, quant, [context] * batch, group, copy, tunings=(main[quant],)
                    )
            if batch > 1 and report.has_time(10):
                attend_row(report, "k8v4-k4v2", ragged(batch, context), group, copy,
                           kind="ragged 4:1", tunings=(main["k8v4-k4v2"],))  # fmt: skip
                attend_row(report, "k8v4-k4v2", [context] * batch, group, copy, high=0.8,
                           tunings=(main["k8v4-k4v2"],))  # fmt: skip
            torch.cuda.empty_cache()
            if not prompts_done:
                prompt_rows(report, copy)
                prompts_done = True


def table(report: Report) -> None:
    print(f"\n{report.facts}")
    print(
        f"{'quant':20} {'kind':10} {'batch':>5} {'context':>7} {'G':>2} {'ms':>8} {'GB/s':>6} "
        f"{'share':>6} {'vs bf16':>7}"
    )
    attention = [r for r in report.rows if r.get("op") == "attend"]
    best: dict[tuple, dict] = {}
    for r in attention:
        key = (r["group"], r["batch"], r["context"], r["quant"], r.get("high"), r["kind"])
        if key not in best or r["ms"] < best[key]["ms"]:
            best[key] = r
    for (group, batch, context, quant, high, kind), r in best.items():
        dense = [
            b["ms"] for k, b in best.items() if k[:3] == (group, batch, context) and "bf16" in k[3]
        ]
        ratio = f"{min(dense) / r['ms']:7.2f}" if dense else ""
        name = f"{quant} {high:.0%}" if "-" in quant else quant
        print(
            f"{name:20} {kind:10} {batch:5} {context:7} {group:2} {r['ms']:8.4f} {r['gbs']:6.0f} "
            f"{r['share']:6.1%} {ratio}"
        )
    for r in report.rows:
        if r.get("op") not in (None, "attend"):
            print("  ".join(f"{k} {shown(v)}" for k, v in r.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--no-checks", action="store_true", help="timings only")
    parser.add_argument("--no-sweep", action="store_true", help="one launch configuration")
    args = parser.parse_args()
    report = Report(args.out, args.minutes)
    if not args.no_checks:
        checks(report)
    try:
        timings(report, not args.no_sweep)
    finally:
        table(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
