"""The pool's own work: what a decode step and a prompt cost besides attention, and how it grows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkv import ops
from diffkv.lab.bench.fill import (
    TIER_MIXES,
    Tokens,
    available_bytes,
    fill,
    kept_tokens,
    make_pool,
    pack,
    random_tokens,
    row_bounds,
)
from diffkv.lab.rows import Writer
from diffkv.lab.timing import WARM_UP, Stopwatch, Timing
from diffkv.layout import PageLayout
from diffkv.ops import Ops
from diffkv.policy import DEFAULT_ALPHA_HIGH, HIGH, LOW, SCORED_QUERIES
from diffkv.quant import QuantConfig
from diffkv.segments import SEGMENT
from diffkv.shape import ENTRY_BYTES, PoolShape
from diffkv.state import PoolState

__all__ = ["Contents", "fits", "measure", "overheads", "run", "sweeps"]

DTYPE = torch.bfloat16
MIX = TIER_MIXES["mix"]
DECODE_OPS, PROMPT_OPS = ("plan_decode", "append"), ("significance", "store_prompt", "gather")
MAX_MEMORY_SHARE = 0.4
OVERHEAD_CTX = 8000
"""No multiple of a segment, as prompts are: the last row of each is a shorter one."""


@dataclass(frozen=True)
class Contents:
    """What a pool manages: requests of `ctx` tokens, in `num_layers` layers of `num_kv_heads` heads."""

    quant: str
    num_layers: int = 32
    num_kv_heads: int = 8
    num_requests: int = 8
    ctx: int = 1024
    group: int = 4
    head_dim: int = 128

    @property
    def num_heads(self) -> int:
        """Heads of all layers."""
        return self.num_layers * self.num_kv_heads

    def needed_bytes(self) -> int:
        """Memory of the pool, at most."""
        layout = PageLayout.derive(
            QuantConfig.parse(self.quant), self.head_dim, None, DTYPE.itemsize
        )
        tokens = self.num_requests * self.num_heads * self.ctx
        return int(tokens * layout.page_token_bytes(0) * 1.1)

    def __str__(self) -> str:
        return (
            f"{self.num_requests} requests, {self.ctx} tokens, {self.num_layers} layers x "
            f"{self.num_kv_heads} heads"
        )


def fits(contents: Contents, device: str, writer: Writer) -> bool:
    """Whether there is memory for a pool; if not, say so."""
    needed = contents.needed_bytes()
    if needed <= MAX_MEMORY_SHARE * available_bytes(device):
        return True
    writer.note(f"{contents}: skipped, needs {needed / 1e9:.1f} GB")
    return False


def sweeps(base: Contents, full: bool, small: bool = False) -> dict[str, list[Contents]]:
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


def measure(contents: Contents, device: str, steps: int) -> dict[str, Timing]:
    """Time every operation of a decode step (all requests) and of a prompt (one request)."""
    kernels, watch = ops.load(device), Stopwatch(device)
    torch.manual_seed(0)
    longest = contents.ctx + 2 * steps + WARM_UP
    heads = (contents.num_layers, contents.num_kv_heads)
    state = make_pool(
        contents.quant, contents.head_dim, DTYPE, heads, contents.num_requests, longest, device
    )
    lengths = [contents.ctx] * contents.num_requests
    tokens = random_tokens(lengths, contents.num_kv_heads, contents.head_dim, DTYPE, device)
    fill(state, kernels, tokens, MIX)
    state.thresholds[:, 0] = DEFAULT_ALPHA_HIGH
    _decode(contents, kernels, state, watch, steps + WARM_UP)
    shape = (SCORED_QUERIES, contents.num_kv_heads * contents.group, contents.head_dim)
    query = torch.randn(shape, device=device).to(DTYPE)
    for _ in range(WARM_UP + max(1, steps // 4)):
        _prompt(contents, kernels, state, watch, tokens, query)
    everyone = torch.arange(contents.num_requests, dtype=torch.int32, device=device)
    watch.time("release", lambda: kernels.release(state, everyone, -1))
    return watch.timings()


def _decode(
    contents: Contents, kernels: Ops, state: PoolState, watch: Stopwatch, steps: int
) -> None:
    device = state.pages.device
    slots = torch.arange(contents.num_requests, dtype=torch.int32, device=device)
    shape = (contents.num_requests, contents.num_kv_heads, contents.head_dim)
    key, value = (torch.randn(shape, device=device).to(DTYPE) for _ in range(2))

    def append_all(plan: Any) -> None:
        for layer in range(contents.num_layers):
            kernels.append(state, layer, plan, key, value)

    for step in range(steps):
        lengths = torch.full_like(slots, contents.ctx + step + 1)
        plan = watch.time("plan_decode", partial(kernels.plan_decode, state, slots, lengths))
        watch.time("append", partial(append_all, plan))


def _prompt(
    contents: Contents,
    kernels: Ops,
    state: PoolState,
    watch: Stopwatch,
    tokens: Tokens,
    query: Tensor,
) -> None:
    """A request's prompt, in all layers: read it back, release it, score it, store it."""
    device = state.pages.device.type
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    packed = pack(tokens, 0, 0, tokens.lengths[0])
    of_query = torch.tensor([0, len(query)], dtype=torch.int32, device=device)
    scale = contents.head_dim**-0.5
    layers = range(contents.num_layers)
    kept = int(state.num_tokens[0].sum(-1).max())
    shape = (kept, contents.num_kv_heads, contents.head_dim)
    key, value = (torch.empty(shape, dtype=DTYPE, device=device) for _ in range(2))
    kept_tiers = torch.empty(contents.num_kv_heads, kept, dtype=torch.int8, device=device)

    def gather_all() -> None:
        for layer in layers:
            kernels.gather(state, layer, slot, of_query[:1], key, value, kept_tiers)

    watch.time("gather", gather_all)
    watch.time("release one", lambda: kernels.release(state, slot, -1))
    starts = of_query, packed.cu_seqlens, packed.cu_seqlens
    sums = watch.time(
        "significance",
        lambda: [
            kernels.significance(query, packed.key, *starts, len(packed.key), scale, len(query))
            for _ in layers
        ],
    )[0]
    chance = torch.rand(sums.shape, device=device)
    tiers = torch.where(chance < MIX, HIGH, LOW).to(torch.int8)

    def store_all() -> None:
        for layer in layers:
            kernels.store_prompt(state, layer, packed, tiers, sums)

    watch.time("store_prompt", store_all)


def run(
    base: Contents, device: str, writer: Writer, steps: int, full: bool, small: bool = False
) -> None:
    """Measure all sweeps, fit exponents, and report the pool's overhead."""
    for name, pools in sweeps(base, full, small).items():
        sizes: list[int] = []
        found: list[dict[str, Timing]] = []
        for contents in pools:
            if fits(contents, device, writer):
                found.append(measure(contents, device, steps))
                _add_rows(writer, name, contents, found[-1])
                size = {"ctx": contents.ctx, "requests": contents.num_requests}
                sizes.append(size.get(name, contents.num_heads))
        _add_exponents(writer, base, name, sizes, found)
    overheads(base, device, writer)


def _add_rows(writer: Writer, sweep: str, contents: Contents, timings: dict[str, Timing]) -> None:
    writer.note(f"{contents}:")
    for name, timing in timings.items():
        group = next((g for g in (DECODE_OPS, PROMPT_OPS) if name in g), (name,))
        share = timing.ms / sum(timings[other].ms for other in group)
        measured = {"ms": timing.ms, "ms_p20": timing.p20, "ms_p80": timing.p80, "share": share}
        beside = f"  {share:4.0%} of {' + '.join(group)}" if len(group) > 1 else ""
        writer.add(
            "pool",
            {"op": name, "sweep": sweep, **asdict(contents)},
            measured,
            f"  {name:14} {timing.ms:9.3f} ms{beside}",
        )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of a power law through the points, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _add_exponents(
    writer: Writer,
    base: Contents,
    sweep: str,
    sizes: list[int],
    found: list[dict[str, Timing]],
) -> None:
    if len(sizes) < 2:
        return
    for name in found[0]:
        if name in ("release", "release one") and sweep == "ctx":
            continue  # one call: microseconds, mostly noise
        power = exponent(sizes, [timings[name].ms for timings in found])
        writer.add(
            "growth",
            {"op": name, "sweep": sweep, "quant": base.quant, "sizes": sizes},
            {"exponent": power},
            f"  {name:14} grows as {sweep}^{power:.2f}, {sizes[0]} to {sizes[-1]}",
        )


def overheads(base: Contents, device: str, writer: Writer) -> None:
    """What of a budget is not tokens when the rows of some requests fill it, by part."""
    contents = replace(base, num_layers=2, num_requests=4, ctx=OVERHEAD_CTX)
    kernels, heads = ops.load(device), (2, contents.num_kv_heads)
    torch.manual_seed(0)
    rows = [stop - start for start, stop in pairwise(row_bounds(contents.ctx, SEGMENT))]
    lengths = rows * contents.num_requests
    state = make_pool(
        contents.quant, contents.head_dim, DTYPE, heads, len(lengths), max(lengths), device
    )
    tokens = random_tokens(lengths, contents.num_kv_heads, contents.head_dim, DTYPE, device)
    fill(state, kernels, tokens, MIX, closed=True)
    for max_model_len in (8 << 10, 32 << 10, 128 << 10):
        parts = _overhead(state, contents.num_requests, max_model_len, SEGMENT)
        total = sum(parts.values())
        text = ", ".join(f"{name.replace('_', ' ')} {part:.2%}" for name, part in parts.items())
        case = {
            "quant": contents.quant,
            "head_dim": contents.head_dim,
            "ctx": contents.ctx,
            "segment": SEGMENT,
            "max_model_len": max_model_len,
            "page_bytes": state.layout.page_bytes,
        }
        where = f"requests of {contents.ctx} tokens, max_model_len {max_model_len}"
        writer.add("overhead", case, {**parts, "overhead": total}, f"{where}: {total:.2%} ({text})")


def _overhead(
    state: PoolState, num_requests: int, max_model_len: int, segment: int
) -> dict[str, float]:
    """Shares of a budget that just holds what a pool holds, by an engine for so many requests."""
    held = int(state.num_pages_held.sum())
    heads = state.num_layers, state.num_kv_heads
    pages = held * state.layout.page_bytes
    shape = PoolShape(state.layout, *heads, 0, max_model_len, held, segment=segment)
    before = None
    while shape != before:  # more slots take more bytes, which may have room for more slots
        before, budget = shape, shape.table_bytes + pages
        least = shape.slots_within(budget, state.layout, shape.num_heads, num_requests, segment)
        shape = replace(shape, num_slots=least + shape.spare_within(budget))
    tokens = sum(
        count * tier.token_bytes
        for layer in range(state.num_layers)
        for count, tier in zip(kept_tokens(state, layer), state.layout.tiers, strict=True)
    )
    ring = held * ENTRY_BYTES
    return {
        "tables": (shape.table_bytes - ring) / budget,
        "ring": ring / budget,
        "half_empty_pages": (pages - tokens) / budget,
    }
