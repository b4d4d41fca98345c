"""The pool's own work: what a decode step and a prompt cost besides attention, and how it grows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from diffkv import ops
from diffkv.lab.bench.facts import Rows, available_bytes, percentile
from diffkv.lab.bench.fill import TIER_MIXES, fill, make_pool, pack, random_tokens, useful_bytes
from diffkv.lab.bench.host_table import HostTable
from diffkv.layout import PageLayout
from diffkv.ops import Ops
from diffkv.policy import DEFAULT_ALPHA_HIGH, HIGH, LOW, SCORED_QUERIES
from diffkv.quant import QuantConfig
from diffkv.shape import ENTRY_BYTES, PoolShape
from diffkv.state import PoolState

__all__ = ["Load", "overheads", "run", "sweeps"]

DTYPE = torch.bfloat16
MIX = TIER_MIXES["mix"]
DECODE_OPS, PROMPT_OPS = ("plan_decode", "append"), ("significance", "store_prompt", "gather")
MAX_MEMORY_SHARE = 0.4
WARM_UP = 2


@dataclass(frozen=True)
class Load:
    """What a pool manages: requests of `ctx` tokens, in `num_layers` layers of `num_kv_heads` heads."""

    num_layers: int = 32
    num_kv_heads: int = 8
    num_requests: int = 8
    ctx: int = 1024
    group: int = 4
    head_dim: int = 128
    quant: str = "k8v4-k4v2"

    @property
    def num_heads(self) -> int:
        """Heads of all layers."""
        return self.num_layers * self.num_kv_heads

    def needed_bytes(self) -> int:
        """Of the pool, at most, and of the host's table."""
        layout = PageLayout.derive(_quant(self), self.head_dim, None, DTYPE.itemsize)
        tokens = self.num_requests * self.num_heads * self.ctx
        return int(tokens * layout.page_token_bytes(0) * 1.1) + 6 * tokens

    def __str__(self) -> str:
        return (
            f"{self.num_requests} requests, {self.ctx} tokens, {self.num_layers} layers x "
            f"{self.num_kv_heads} heads"
        )


def _quant(load: Load) -> QuantConfig:
    return QuantConfig.parse(load.quant)


def sweeps(base: Load, full: bool, small: bool = False) -> dict[str, list[Load]]:
    """What grows: contexts, requests, heads; the other two stay small, or memory would not do."""
    contexts: tuple[int, ...] = (1024, 4096, 16384, 65536) if full else (1024, 4096, 16384)
    requests: tuple[int, ...] = (1, 4, 16, 64, 256) if full else (1, 4, 16, 64)
    heads: tuple[tuple[int, int], ...] = (
        ((8, 8), (32, 8), (32, 20), (80, 16), (80, 32)) if full else ((8, 8), (16, 8), (32, 8))
    )
    if small:
        contexts, requests, heads = (512, 1024), (1, 2), ((2, 8), (4, 8))
    few = replace(base, num_requests=1)
    return {
        "ctx": [replace(few, ctx=ctx, num_layers=min(base.num_layers, 8)) for ctx in contexts],
        "requests": [replace(base, num_requests=n, ctx=256) for n in requests],
        "heads": [replace(few, num_layers=layers, num_kv_heads=h) for layers, h in heads],
    }


class _Clock:
    """Seconds by operation."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        """Run a call and note how long it took, until the device is done with it."""
        self._wait()
        start = time.perf_counter()
        result = call()
        self._wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def medians(self) -> dict[str, float]:
        """Of each operation, in milliseconds, first calls left out."""
        return {
            name: median(values[WARM_UP:] or values) * 1e3 for name, values in self.seconds.items()
        }


def measure(load: Load, device: str, steps: int) -> _Clock:
    """Time every operation of a decode step (all requests) and of a prompt (one request)."""
    kernels, clock = ops.load(device), _Clock(device)
    torch.manual_seed(0)
    longest = load.ctx + 2 * steps + WARM_UP
    heads = (load.num_layers, load.num_kv_heads)
    state = make_pool(load.quant, load.head_dim, DTYPE, heads, load.num_requests, longest, device)
    lengths = [load.ctx] * load.num_requests
    tokens = random_tokens(lengths, load.num_kv_heads, load.head_dim, DTYPE, device)
    fill(state, kernels, tokens, MIX)
    state.thresholds[:, 0] = DEFAULT_ALPHA_HIGH
    _decode(load, kernels, state, clock, steps + WARM_UP)
    query = torch.randn(
        SCORED_QUERIES, load.num_kv_heads * load.group, load.head_dim, device=device
    ).to(DTYPE)
    for _ in range(max(3, steps // 4)):
        _prompt(load, kernels, state, clock, tokens, query)
    everyone = torch.arange(load.num_requests, dtype=torch.int32, device=device)
    clock.time("release", lambda: kernels.release(state, everyone, -1))
    return clock


def _decode(load: Load, kernels: Ops, state: PoolState, clock: _Clock, steps: int) -> None:
    device = state.pages.device
    slots = torch.arange(load.num_requests, dtype=torch.int32, device=device)
    shape = (load.num_requests, load.num_kv_heads, load.head_dim)
    key, value = (torch.randn(shape, device=device).to(DTYPE) for _ in range(2))

    def append_all(plan: Any) -> None:
        for layer in range(load.num_layers):
            kernels.append(state, layer, plan, key, value)

    for step in range(steps):
        lengths = torch.full_like(slots, load.ctx + step + 1)
        plan = clock.time("plan_decode", partial(kernels.plan_decode, state, slots, lengths))
        clock.time("append", partial(append_all, plan))


def _prompt(
    load: Load, kernels: Ops, state: PoolState, clock: _Clock, tokens: Any, query: torch.Tensor
) -> None:
    """A request's prompt, in all layers: read it back, release it, score it, store it."""
    device = state.pages.device.type
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    packed = pack(tokens, [0], device)
    starts = torch.tensor([0, len(query)], dtype=torch.int32, device=device)
    scale = load.head_dim**-0.5
    layers = range(load.num_layers)
    kept = int(state.num_tokens[0].sum(-1).max())
    clock.time("gather", lambda: [kernels.gather(state, i, 0, kept) for i in layers])
    clock.time("release one", lambda: kernels.release(state, slot, -1))
    sums = clock.time(
        "significance",
        lambda: [
            kernels.significance(query, packed.key, starts, packed.cu_seqlens, scale, len(query))
            for _ in layers
        ],
    )[0]
    chance = torch.rand(sums.shape, device=device)
    tiers = torch.where(chance < MIX, HIGH, LOW).to(torch.int8)

    def store_all() -> None:
        for layer in layers:
            kernels.store_prompt(state, layer, packed, tiers, sums)

    clock.time("store_prompt", store_all)


def _measure_host(load: Load, steps: int) -> _Clock:
    layout = PageLayout.derive(_quant(load), load.head_dim, None, DTYPE.itemsize)
    per_page = (layout.tiers[0].tokens_per_page, layout.tiers[-1].tokens_per_page)
    shape = (load.num_requests, load.num_layers, load.num_kv_heads, load.ctx)
    table, clock = HostTable(shape, per_page, MIX, DEFAULT_ALPHA_HIGH), _Clock("cpu")
    for _ in range(steps + WARM_UP):
        clock.time("host numpy", table.step_numpy)
    for _ in range(WARM_UP + 1):
        clock.time("host python", table.step_python)
    return clock


def run(base: Load, device: str, rows: Rows, steps: int, full: bool, small: bool = False) -> None:
    """Measure all sweeps, fit exponents, and report the pool's overhead."""
    limit = MAX_MEMORY_SHARE * available_bytes(device)
    for name, loads in sweeps(base, full, small).items():
        sizes: list[int] = []
        medians: list[dict[str, float]] = []
        for load in loads:
            if load.needed_bytes() > limit:
                rows.note(f"{load}: skipped, needs {load.needed_bytes() / 1e9:.1f} GB")
                continue
            clock = measure(load, device, steps)
            clock.seconds.update(_measure_host(load, steps).seconds)
            _add_rows(rows, name, load, clock, device)
            sizes.append({"ctx": load.ctx, "requests": load.num_requests}.get(name, load.num_heads))
            medians.append(clock.medians())
        _add_exponents(rows, name, sizes, medians)
    overheads(base, device, rows)


def _add_rows(rows: Rows, sweep: str, load: Load, clock: _Clock, device: str) -> None:
    ms = clock.medians()
    rows.note(f"{load}:")
    for name, values in clock.seconds.items():
        group = next((g for g in (DECODE_OPS, PROMPT_OPS) if name in g), (name,))
        share = ms[name] / sum(ms[other] for other in group)
        timed = [value * 1e3 for value in values[WARM_UP:] or values]
        row = {
            "op": name, "sweep": sweep, **asdict(load), "device_type": device,
            "threads": torch.get_num_threads(), "ms": ms[name], "share": share,
            "ms_p20": percentile(timed, 0.2), "ms_p80": percentile(timed, 0.8),
        }  # fmt: skip
        if name.startswith("host"):
            row["vs_plan_decode"] = ms[name] / ms["plan_decode"]
            beside = f"  {row['vs_plan_decode']:.1f}x plan_decode"
        else:
            beside = f"  {share:4.0%} of {' + '.join(group)}" if len(group) > 1 else ""
        rows.add(row, f"  {name:14} {ms[name]:9.3f} ms{beside}")


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of a power law through the points, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _add_exponents(
    rows: Rows, sweep: str, sizes: list[int], medians: list[dict[str, float]]
) -> None:
    if len(sizes) < 2:
        return
    for name in medians[0]:
        if name in ("release", "release one") and sweep == "ctx":
            continue  # one call: microseconds, mostly noise
        power = exponent(sizes, [each[name] for each in medians])
        rows.add(
            {"op": name, "sweep": sweep, "sizes": sizes, "exponent": power},
            f"  {name:14} grows as {sweep}^{power:.2f}, {sizes[0]} to {sizes[-1]}",
        )


def overheads(base: Load, device: str, rows: Rows, ctx: int = 1024) -> None:
    """What of a budget is not tokens when requests of `ctx` tokens fill it, by part."""
    load = replace(base, num_layers=2, num_requests=4, ctx=ctx)
    kernels = ops.load(device)
    torch.manual_seed(0)
    heads = (load.num_layers, load.num_kv_heads)
    for max_model_len in (ctx, 8 * ctx, 32 * ctx, 128 * ctx):
        state = make_pool(
            load.quant, load.head_dim, DTYPE, heads, load.num_requests, max_model_len, device
        )
        lengths = [ctx] * load.num_requests
        tokens = random_tokens(lengths, load.num_kv_heads, load.head_dim, DTYPE, device)
        fill(state, kernels, tokens, MIX)
        held = int(state.num_pages_held.sum())
        shape = PoolShape(state.layout, *heads, load.num_requests, max_model_len, held)
        pages = held * state.layout.page_bytes
        budget = shape.table_bytes + pages
        useful = sum(useful_bytes(state, layer) for layer in range(load.num_layers))
        ring = held * ENTRY_BYTES
        parts = {
            "tables": (shape.table_bytes - ring) / budget,
            "ring": ring / budget,
            "half_empty_pages": (pages - useful) / budget,
        }
        total = sum(parts.values())
        row = {
            "op": "overhead", "quant": load.quant, "head_dim": load.head_dim, "ctx": ctx,
            "max_model_len": max_model_len, "page_bytes": state.layout.page_bytes, **parts,
            "overhead": total,
        }  # fmt: skip
        text = ", ".join(f"{name.replace('_', ' ')} {part:.2%}" for name, part in parts.items())
        rows.add(
            row, f"overhead at {ctx} tokens, max_model_len {max_model_len}: {total:.2%} ({text})"
        )
