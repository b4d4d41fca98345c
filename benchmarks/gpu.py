"""Correctness and speed of the Triton kernels on one GPU, without vLLM.

    PYTHONPATH=src python benchmarks/gpu.py --out DIR --minutes 8

First every operation against the reference, then attention against torch in float32, then timings: the
most important rows first, the others as long as there is time. Times are medians over CUDA-graph
replays with a cold L2 cache, with 20/80 percentiles. GB/s counts useful bytes (codes, scales, zeros of
kept tokens); `share` is of the bandwidth of a streaming copy in the same run. One JSON line a row.
"""

import argparse
import dataclasses
import os
import statistics
import sys
from pathlib import Path

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/kernels"))
from gpu_baselines import baseline_rows
from gpu_checks import checks, on_cpu
from gpu_report import DTYPE, HEAD_DIM, HEADS, Report, copy_row, measure, shown
from make import assert_same, copy_of

from diffkv import pool
from diffkv.kernels import triton as kernels
from diffkv.kernels.triton.workspace import Tuning, workspace
from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig
from diffkv.shape import PoolShape
from diffkv.state import TENSORS, PoolState, PromptTokens

MIXED_HIGH = 0.2
MIX = "k8v4-k4v2"
QUANTS = (MIX, "k8v4", "k4v2", "k8v8", "k4v4", "k16v16")

SWEEP = tuple(
    Tuning(num_stages=s, programs=p, tile=t)
    for s, p, t in ((5, 8, None), (5, 12, 32), (4, 8, None))
)  # fmt: skip


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
    shares = (1.0,) if layout.low is None else (high, 1 - high)
    pages = sum(
        HEADS * (-(-int(n * share * 1.05 + 64) // tier.tokens_per_page) + 2)
        for n in lens
        for share, tier in zip(shares, layout.tiers, strict=True)
    )
    num_pages = num_layers * (pages + len(lens) * HEADS * spare // 16)
    shape = PoolShape(layout, num_layers, HEADS, len(lens), max(lens) + spare, num_pages)
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
    bytes_each = (tier.vector_bytes for tier in state.layout.tiers)  # without sum and position
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
) -> None:  # fmt: skip
    state = filled(quant, lens, high)
    batch = len(lens)
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    query = torch.randn(batch, HEADS * group, HEAD_DIM, dtype=DTYPE, device="cuda")
    output = torch.full_like(query, torch.nan)
    work = workspace(state)
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
    kept = {n: getattr(state, n).clone() for n in TENSORS if n != "pages"}
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
    most = num + 200
    num_pages = layers * requests * HEADS * layout.max_pages(most) * 3 // 4
    shape = PoolShape(layout, layers, HEADS, requests, most, num_pages)
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


def main_rows(report: Report, copy: float, sweep: bool) -> None:
    """The shape that targets are for, and a decode step in a graph."""
    baseline_rows(report, 32, 16384, 4, copy)
    for quant in QUANTS:
        tunings = SWEEP if sweep else SWEEP[:1]
        attend_row(report, quant, [16384] * 32, 4, copy, tunings=tunings)
    attend_row(report, MIX, ragged(32, 16384), 4, copy, kind="ragged 4:1")
    graph_row(report)


def other_rows(report: Report, copy: float) -> None:
    """Plan, release and prompts; then attention of other shapes, as long as there is time."""
    free = torch.cuda.mem_get_info()[0]
    plan_rows(report)
    prompt_rows(report, copy)
    torch.cuda.empty_cache()
    grid = [
        (context, batch)
        for context, batch in (
            (1024, 8), (4096, 8), (16384, 8), (65536, 8), (1024, 32), (4096, 32), (1024, 128),
            (4096, 1), (65536, 1), (1024, 1), (16384, 1), (4096, 128), (16384, 128), (65536, 32),
        )
        if context * batch * HEADS * HEAD_DIM * 4 * 4 < free
    ]  # fmt: skip
    for group in (4, 8):
        if group == 8:
            grid = [(16384, 32), *grid]
        for context, batch in grid:
            if not report.has_time(25):
                return
            baseline_rows(report, batch, context, group, copy)
            for quant in QUANTS:
                if report.has_time(10):
                    attend_row(report, quant, [context] * batch, group, copy)
            if batch > 1 and report.has_time(10):
                attend_row(report, MIX, ragged(batch, context), group, copy, kind="ragged 4:1")
                attend_row(report, MIX, [context] * batch, group, copy, high=0.8)
            torch.cuda.empty_cache()


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
    parser.add_argument("--part", choices=["all", "main", "other"], default="all",
                        help="main: checks and 32 requests of 16 K; other: all but these")  # fmt: skip
    parser.add_argument("--sweep", action="store_true", help="other launch configurations, too")
    args = parser.parse_args()
    report = Report(args.out, args.minutes)
    if args.part != "other":
        checks(report)
    try:
        copy = copy_row(report)
        if args.part != "other":
            main_rows(report, copy, args.sweep)
        if args.part != "main":
            other_rows(report, copy)
    finally:
        table(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
