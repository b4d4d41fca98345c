"""Decode attention on the CPU: DiffKV's pages against vLLM's own kernel over a bfloat16 cache.

Both read all tokens of a context once, in turn, so that noise of the machine meets both alike. Each
repeat reads another layer, and all layers together are larger than the caches: what is timed is
reading from memory, as in a model. The share of the read bandwidth that a plain sum reaches says how
far a kernel is from the best possible. The last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkv import pool
from diffkv.kernels import cpu
from diffkv.layout import PageLayout
from diffkv.policy import HIGH, LOW
from diffkv.quant import QuantConfig
from diffkv.state import PoolState, PromptTokens

COLD_BYTES = 384 << 20
BLOCK_TOKENS = 128
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One kernel: `run(layer)` reads `num_bytes` of one of `num_layers` layers."""

    name: str
    run: Callable[[int], None]
    num_layers: int
    num_bytes: int


def diffkv_case(args: argparse.Namespace, quant: str, low_share: float, query: Tensor) -> Case:
    """Our attention over a pool filled by `store_prompt`; `low_share` of the tokens are low."""
    layout = PageLayout.derive(QuantConfig.parse(quant), args.head_dim, None, DTYPE.itemsize)
    width = layout.max_pages(args.ctx)
    num_layers = max(2, -(-COLD_BYTES // (args.kv_heads * width * layout.page_bytes)))
    num_pages = num_layers * args.kv_heads * width
    shape = pool.PoolShape(layout, num_layers, args.kv_heads, 1, width, num_pages)
    buffer = torch.empty(shape.table_bytes + num_pages * layout.page_bytes, dtype=torch.uint8)
    state = pool.create(shape, buffer, DTYPE, window=64)
    state.free_ring.copy_(torch.randperm(num_pages))
    tokens = random_tokens(state, args.ctx)
    tiers = torch.where(torch.rand(args.kv_heads, args.ctx) < low_share, LOW, HIGH).to(torch.int8)
    for layer in range(num_layers):
        cpu.store_prompt(state, layer, tokens, tiers, torch.zeros(tiers.shape))
    slots, output = torch.zeros(1, dtype=torch.int32), torch.empty_like(query)

    def run(layer: int) -> None:
        cpu.attend(state, layer, slots, query, args.head_dim**-0.5, output)

    held = int(state.num_pages_held[0, 0].sum())
    return Case(f"diffkv {quant}", run, num_layers, held * layout.page_bytes)


def random_tokens(state: PoolState, ctx: int) -> PromptTokens:
    """A prompt of normal random keys and values."""
    shape = (ctx, state.num_kv_heads, state.layout.head_dim)
    return PromptTokens(
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([0, ctx], dtype=torch.int32),
        torch.randn(shape).to(DTYPE),
        torch.randn(shape).to(DTYPE),
        torch.arange(ctx, dtype=torch.int32),
    )


def vllm_case(args: argparse.Namespace, query: Tensor) -> Case:
    """vLLM's CPU kernel, called as its CPU backend does."""
    import vllm._C  # noqa: F401, registers the operations
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    blocks = -(-args.ctx // BLOCK_TOKENS)
    shape = (blocks, args.kv_heads, BLOCK_TOKENS, 2 * args.head_dim)
    num_bytes = torch.Size(shape).numel() * DTYPE.itemsize
    num_layers = max(2, -(-COLD_BYTES // num_bytes))
    isa = _get_attn_isa(DTYPE, BLOCK_TOKENS, args.head_dim)
    key, value = (torch.randn(args.ctx, args.kv_heads, args.head_dim).to(DTYPE) for _ in range(2))
    caches = []
    for _ in range(num_layers):
        cache = torch.zeros(shape, dtype=DTYPE).view(blocks, args.kv_heads, 2 * BLOCK_TOKENS, -1)
        caches.append(cache.chunk(2, dim=2))
        ops.cpu_attn_reshape_and_cache(key, value, *caches[-1], torch.arange(args.ctx), isa)
    query_start_loc = torch.tensor([0, 1], dtype=torch.int32)
    seq_lens = torch.tensor([args.ctx], dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        1, query.shape[1], args.kv_heads, args.head_dim, seq_lens, DTYPE, query_start_loc,
        True, -1, isa, True,
    )  # fmt: skip
    table = torch.arange(blocks, dtype=torch.int32)[None]
    output = torch.empty_like(query)

    def run(layer: int) -> None:
        ops.cpu_attention_with_kv_cache(
            query, *caches[layer], output, query_start_loc, seq_lens, args.head_dim**-0.5, True,
            None, -1, table, 0.0, metadata, None,
        )  # fmt: skip

    return Case(f"vllm bfloat16 ({isa})", run, num_layers, num_bytes)


def read_case() -> Case:
    """A plain sum: the read bandwidth that a kernel could reach."""
    data = torch.ones(2, COLD_BYTES // 4, dtype=torch.float32)

    def run(layer: int) -> None:
        data[layer].sum()

    return Case("read (sum)", run, 2, COLD_BYTES)


def measure(cases: list[Case], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every case in every repeat, cases in turn; the first two repeats warm up."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for repeat in range(repeats + 2):
        for case in cases:
            start = clock()
            case.run(repeat % case.num_layers)
            if repeat >= 2:
                seconds[case.name].append(clock() - start)
    return seconds


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quant", nargs="+", default=["k8v4", "k8v4-k4v2", "k16v16"])
    parser.add_argument("--low-share", type=float, default=1.0, help="low tokens of two tiers")
    parser.add_argument("--ctx", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="time of the one thread, on a machine that is shared",
    )
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time is the time of one thread: add --threads 1")
    return args


def main() -> None:
    """Measure, print a table, then one JSON line."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    query = torch.randn(1, args.kv_heads * args.group, args.head_dim).to(DTYPE)
    cases = [read_case()]
    if not args.no_vllm:
        cases.append(vllm_case(args, query))
    for quant in args.quant:
        cases.append(diffkv_case(args, quant, args.low_share if "-" in quant else 0.0, query))
    seconds = measure(cases, args.repeats, time.thread_time if args.cpu_time else time.perf_counter)
    best = cases[0].num_bytes / statistics.median(seconds[cases[0].name])
    rows = []
    titles = ("ms", "best", "p20", "p80", "MB", "GB/s")
    print(f"{'kernel':24}" + "".join(f"{title:>9}" for title in titles) + "  of read")
    for case in cases:
        times = sorted(second * 1e3 for second in seconds[case.name])
        low, median, high = (times[int(len(times) * q)] for q in (0.2, 0.5, 0.8))
        rate = case.num_bytes / median * 1e3
        row = (median, times[0], low, high, case.num_bytes / 1e6, rate / 1e9)
        print(f"{case.name:24}" + "".join(f"{x:9.3f}" for x in row) + f"{rate / best:9.0%}")
        names = ("ms", "best_ms", "p20_ms", "p80_ms")
        rows.append(
            {"kernel": case.name, **dict(zip(names, row, strict=False)),
             "bytes": case.num_bytes, "of_read": rate / best}
        )  # fmt: skip
    facts = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    print(json.dumps({**vars(args), **facts, "results": rows}))


if __name__ == "__main__":
    main()
