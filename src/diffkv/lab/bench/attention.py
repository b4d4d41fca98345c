"""Decode attention: DiffKV's pages against the engine's own cache, over a grid of shapes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from diffkv import ops
from diffkv.lab.bench.facts import Rows, available_bytes
from diffkv.lab.bench.fill import TIER_MIXES, Tokens, fill, make_pool, random_tokens, useful_bytes
from diffkv.lab.bench.stock import dense_attention, stock_cases
from diffkv.lab.bench.timing import Case, Timing, measure, read_case
from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig

__all__ = ["Grid", "Point", "run"]

DTYPE = torch.bfloat16
MAX_MEMORY_SHARE = 0.5
WRONG = 0.5
"""Relative error of an output that no quantisation explains."""
CODE_OF_STOCK = {"stock bf16": "bf16", "stock fp8": "fp8"}


@dataclass(frozen=True)
class Grid:
    """What to measure: the product of all lists.

    Attributes:
        quants: quantisation configurations.
        tiers: names of `TIER_MIXES`; formats of one tier are measured once.
        contexts: tokens of a request; of ragged ones, their mean.
        batches: requests.
        groups: query heads of a KV head.
        ragged: whether lengths, and the tiers of heads, differ.
        num_kv_heads: of the layer.
        head_dim: elements of a head's key.
        repeats: timed calls.
        warm: leave the caches as the last call left them, to see what arithmetic takes.
    """

    quants: list[str]
    tiers: list[str]
    contexts: list[int]
    batches: list[int]
    groups: list[int]
    ragged: list[bool]
    num_kv_heads: int = 8
    head_dim: int = 128
    repeats: int = 20
    warm: bool = False

    def points(self) -> Iterator["Point"]:
        """Each shape once."""
        for ragged, ctx, batch, group in product(
            self.ragged, self.contexts, self.batches, self.groups
        ):
            if not (ragged and batch == 1):
                yield Point(ctx, batch, group, ragged)


@dataclass(frozen=True)
class Point:
    """One shape: context, requests, query heads of a KV head, and whether lengths differ."""

    ctx: int
    batch: int
    group: int
    ragged: bool

    def lengths(self) -> list[int]:
        """Tokens of each request; ragged ones go from a quarter of the mean to seven quarters."""
        if not self.ragged:
            return [self.ctx] * self.batch
        return [int(x) for x in torch.linspace(self.ctx / 4, self.ctx * 7 / 4, self.batch)]

    def __str__(self) -> str:
        shape = f"ctx {self.ctx}, batch {self.batch}, group {self.group}"
        return shape + (", ragged" if self.ragged else "")


def run(
    grid: Grid, device: str, rows: Rows, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Measure a grid, on CPUs by `clock`; a shape that does not fit memory is named and left out."""
    kernels = ops.load(device)
    for point in grid.points():
        needed = _needed_bytes(grid, point)
        available = int(MAX_MEMORY_SHARE * available_bytes(device))
        if needed > available:
            rows.note(
                f"{point}: skipped, needs {needed / 1e9:.1f} GB, half of the free memory is "
                f"{available / 1e9:.1f} GB"
            )
            continue
        torch.manual_seed(0)
        heads, head_dim = grid.num_kv_heads, grid.head_dim
        tokens = random_tokens(point.lengths(), heads, head_dim, DTYPE, device)
        query = torch.randn(point.batch, heads * point.group, head_dim, device=device).to(DTYPE)
        pairs, missing = stock_cases(query, tokens, head_dim**-0.5, device)
        for line in missing:
            rows.note(f"{point}: {line}")
        pairs += [
            _our_case(grid, quant, mix, point, query, tokens, kernels)
            for quant, mix in _formats(grid)
        ]
        cases = [read_case(device), *(case for case, _ in pairs)]
        timings = measure(cases, grid.repeats, device, clock, grid.warm)
        errors = _errors(pairs, dense_attention(query, tokens, head_dim**-0.5))
        _add_rows(rows, grid, point, cases, timings, errors)


def _formats(grid: Grid) -> Iterator[tuple[str, str]]:
    for quant in grid.quants:
        for mix in grid.tiers if QuantConfig.parse(quant).low is not None else ["high"]:
            yield quant, mix


def _needed_bytes(grid: Grid, point: Point) -> int:
    """Memory of all caches of a shape, and of what fills them."""
    lengths, heads = point.lengths(), grid.num_kv_heads
    dense = sum(lengths) * heads * 2 * grid.head_dim
    layouts = [
        PageLayout.derive(QuantConfig.parse(quant), grid.head_dim, None, DTYPE.itemsize)
        for quant, _ in _formats(grid)
    ]
    pools = sum(
        len(lengths) * heads * layout.max_pages(max(lengths)) * layout.page_bytes
        for layout in layouts
    )
    return dense * 3 + pools + max(lengths) * heads * grid.head_dim * 16


def _our_case(
    grid: Grid, quant: str, mix: str, point: Point, query: Tensor, tokens: Tokens, kernels: ops.Ops
) -> tuple[Case, Tensor]:
    device, lengths = query.device.type, tokens.lengths
    state = make_pool(
        quant, grid.head_dim, DTYPE, (1, grid.num_kv_heads), point.batch, max(lengths), device
    )
    fill(state, kernels, tokens, TIER_MIXES[mix], point.ragged)
    slots = torch.arange(point.batch, dtype=torch.int32, device=device)
    output = torch.empty_like(query)

    def run() -> None:
        kernels.attend(state, 0, slots, query, grid.head_dim**-0.5, output)

    facts = {"quant": quant, "tiers": mix}
    return Case(f"{quant} {mix}", run, useful_bytes(state, 0), facts), output


def _errors(pairs: list[tuple[Case, Tensor]], exact: Tensor) -> list[float]:
    """Relative error of every case's last output, to see that what was timed is attention.

    Raises:
        RuntimeError: an output is so far off that its time means nothing.
    """
    errors = []
    for case, output in pairs:
        error = float((output.float() - exact).norm() / exact.norm())
        coarse = case.facts.get("tiers") in ("low", "mix")  # as coarse as the user's format
        if not error < WRONG and not coarse:
            raise RuntimeError(f"{case.name}: wrong output, relative error {error:.3g}")
        errors.append(error)
    return errors


def _add_rows(
    rows: Rows, grid: Grid, point: Point, cases: list[Case], timings: list[Timing],
    errors: list[float],
) -> None:  # fmt: skip
    peak = cases[0].num_bytes / timings[0].ms
    ms = {case.name: timing.ms for case, timing in zip(cases, timings, strict=True)}
    rows.note(f"{point}, {cases[0].name} {peak / 1e6:.1f} GB/s")
    for case, timing, error in zip(cases[1:], timings[1:], errors, strict=True):
        rate = case.num_bytes / timing.ms
        ratios = {
            f"vs_stock_{code}": ms[name] / timing.ms if name in ms else None
            for name, code in CODE_OF_STOCK.items()
        }
        row: dict[str, Any] = {
            "op": "attend", "quant": CODE_OF_STOCK.get(case.name), "tiers": None,
            "head_dim": grid.head_dim, "num_kv_heads": grid.num_kv_heads, "group": point.group,
            "ctx": point.ctx, "batch": point.batch, "ragged": point.ragged,
            "threads": torch.get_num_threads(), "repeats": grid.repeats, "warm": grid.warm,
            "ms": timing.ms,
            "ms_p20": timing.p20, "ms_p80": timing.p80, "bytes": case.num_bytes,
            "gb_per_s": rate / 1e6, "read_bandwidth_share": rate / peak,
            "relative_error": error, **ratios, **case.facts,
        }  # fmt: skip
        beside = "".join(
            f"  {value:5.2f}x of {name}"
            for (name, value) in zip(("bf16", "fp8"), ratios.values(), strict=True)
            if value is not None
        )
        text = (
            f"  {case.name:22} {timing.ms:9.3f} ms ({timing.p20:.3f} to {timing.p80:.3f})"
            f" {rate / 1e6:7.1f} GB/s {rate / peak:5.0%} of {cases[0].name}{beside}"
        )
        rows.add(row, text)
