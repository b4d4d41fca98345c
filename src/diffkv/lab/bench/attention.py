"""Decode attention: DiffKV's pages against the engine's own cache, over a grid of shapes."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product

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
    random_tokens,
    row_bounds,
)
from diffkv.lab.bench.stock import Checked, dense_attention, stock_cases
from diffkv.lab.rows import Writer
from diffkv.lab.timing import Case, Timing, measure, peak_gb_per_s, stream_case
from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig
from diffkv.rotation import choose, signs_of
from diffkv.segments import SEGMENT
from diffkv.state import PoolState

__all__ = ["Grid", "Point", "run"]

DTYPE = torch.bfloat16
MAX_MEMORY_SHARE = 0.5
LIMIT = 0.02
"""Largest relative error beside float32 attention over what our pages hold."""

COMPARED = ("bf16", "fp8")
"""vLLM's caches that a row's ratios are to, where they run."""


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
        num_kv_heads: KV heads of the layer.
        head_dim: elements of a head's key.
        repeats: timed calls.
        warm: leave the caches as the last call left them, to see what arithmetic takes.
        segment: tokens after which rows of ours are closed, as in an engine; 0: requests are one row.
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
    segment: int = SEGMENT

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


@dataclass(frozen=True)
class Bandwidth:
    """What shares are of: the GB/s that a stream reached, by its name, and the memory's peak."""

    name: str
    gb_per_s: float
    peak: float | None


def run(
    grid: Grid, device: str, writer: Writer, clock: Callable[[], float] = time.perf_counter
) -> None:
    """Measure a grid, on CPUs by `clock`; a shape that does not fit memory is named and left out.

    Raises:
        RuntimeError: an output is wrong, so that its time would mean nothing.
    """
    kernels, peak = ops.load(device), peak_gb_per_s(device)
    for point in grid.points():
        needed = _needed_bytes(grid, point)
        available = int(MAX_MEMORY_SHARE * available_bytes(device))
        if needed > available:
            writer.note(
                f"{point}: skipped, needs {needed / 1e9:.1f} GB, half of the free memory is "
                f"{available / 1e9:.1f} GB"
            )
            continue
        torch.manual_seed(0)
        heads, head_dim = grid.num_kv_heads, grid.head_dim
        tokens = random_tokens(point.lengths(), heads, head_dim, DTYPE, device)
        query = torch.randn(point.batch, heads * point.group, head_dim, device=device).to(DTYPE)
        checked, missing = stock_cases(query, tokens, head_dim**-0.5, device)
        for line in missing:
            writer.note(f"{point}: {line}")
        exact = dense_attention(query, tokens, head_dim**-0.5)
        errors = [_check(each, exact) for each in checked]
        cases = [each.case for each in checked]
        for quant, mix in _formats(grid):
            case, output = _our_case(grid, quant, mix, point, query, tokens, kernels)
            cases.append(case)
            errors.append(_error(output, exact))
        stream = stream_case(device)
        timings = measure([stream, *cases], grid.repeats, device, clock, grid.warm)
        reached = Bandwidth(stream.name, stream.num_bytes / timings[0].ms / 1e6, peak)
        writer.note(f"{point}, {stream.name} {reached.gb_per_s:.1f} GB/s")
        _add_rows(writer, grid, point, cases, timings[1:], errors, reached)
        del stream, cases, checked, tokens, query, exact
        if device == "cuda":
            torch.cuda.empty_cache()


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
    pools = sum(_num_pages(grid, layout, lengths) * layout.page_bytes for layout in layouts)
    return dense * 3 + pools + max(lengths) * heads * grid.head_dim * 16


def _rows(grid: Grid, lengths: Sequence[int]) -> list[int]:
    """Tokens of every row, of all requests."""
    bounds = [row_bounds(length, grid.segment) for length in lengths]
    return [end - start for each in bounds for start, end in pairwise(each)]


def _num_pages(grid: Grid, layout: PageLayout, lengths: Sequence[int]) -> int:
    """Most pages that requests can take in one layer."""
    return grid.num_kv_heads * sum(map(layout.max_pages, _rows(grid, lengths)))


def _our_case(
    grid: Grid, quant: str, mix: str, point: Point, query: Tensor, tokens: Tokens, kernels: ops.Ops
) -> tuple[Case, Tensor]:
    """A pool's attention, checked, and its output: rotated as an engine's, where it would be."""
    device, lengths = query.device.type, tokens.lengths
    rotation = choose(None, QuantConfig.parse(quant))
    signs = signs_of(rotation, grid.head_dim, query.device)
    layout = PageLayout.derive(QuantConfig.parse(quant), grid.head_dim, None, DTYPE.itemsize)
    state = make_pool(
        quant,
        grid.head_dim,
        DTYPE,
        (1, grid.num_kv_heads),
        len(_rows(grid, lengths)),
        max(lengths),
        device,
        _num_pages(grid, layout, lengths),
        grid.segment,
    )
    turned = _turned(tokens, kernels, signs)
    fill(state, kernels, turned, TIER_MIXES[mix], point.ragged, grid.segment)
    slots = torch.arange(point.batch, dtype=torch.int32, device=device)
    output = torch.empty_like(query)
    scale = grid.head_dim**-0.5

    def run() -> None:
        kernels.attend(state, 0, slots, query, scale, output, signs)

    kept = zip(kept_tokens(state, 0), state.layout.tiers, strict=True)
    num_bytes = sum(count * tier.vector_bytes for count, tier in kept)
    facts = {"engine": "diffkv", "quant": quant, "tiers": mix}
    checked = Checked(Case(f"{quant} {mix}", run, num_bytes, facts), output, LIMIT)
    longest = lengths.index(max(lengths))
    for slot in {0, longest}:
        stored = _stored(state, kernels, slot, row_bounds(lengths[slot], grid.segment))
        stored = _turned(stored, kernels, signs, back=True)
        one = slice(slot, slot + 1)
        _check(checked, dense_attention(query[one], stored, scale), one)
    return checked.case, output


def _turned(tokens: Tokens, kernels: ops.Ops, signs: Tensor | None, back: bool = False) -> Tokens:
    """Keys and values rotated, or back; as they are without signs."""
    if signs is None:
        return tokens
    turned = Tokens(torch.empty_like(tokens.key), torch.empty_like(tokens.value), tokens.lengths)
    kernels.rotate(tokens.key, signs, back, turned.key)
    kernels.rotate(tokens.value, signs, back, turned.value)
    return turned


def _stored(state: PoolState, kernels: ops.Ops, slot: int, bounds: Sequence[int]) -> Tokens:
    """What the pages of a request's rows hold, in no particular order of each."""
    device, heads, length = state.pages.device, state.num_kv_heads, bounds[-1]
    key = torch.empty(length, heads, state.layout.head_dim, dtype=state.dtype, device=device)
    value, tiers = (
        torch.empty_like(key),
        torch.empty(heads, length, dtype=torch.int8, device=device),
    )
    chain = state.chains[slot, : int(state.chain_lens[slot])].tolist()
    rows = torch.tensor([*chain, slot], dtype=torch.int32, device=device)
    starts = torch.tensor(bounds[:-1], dtype=torch.int32, device=device)
    kernels.gather(state, 0, rows, starts, key, value, tiers)
    return Tokens(key, value, [length])


def _error(output: Tensor, exact: Tensor) -> float:
    return float((output.float() - exact).norm() / exact.norm())


def _check(checked: Checked, exact: Tensor, rows: slice = slice(None)) -> float:
    """Run a case once; the relative error of some requests' outputs.

    Raises:
        RuntimeError: it is larger than its limit.
    """
    checked.output.fill_(torch.nan)
    checked.case.run()
    error = _error(checked.output[rows], exact)
    if not error < checked.limit:
        raise RuntimeError(f"{checked.case.name}: wrong output, relative error {error:.3g}")
    return error


def _add_rows(
    writer: Writer,
    grid: Grid,
    point: Point,
    cases: list[Case],
    timings: list[Timing],
    errors: list[float],
    bandwidth: Bandwidth,
) -> None:
    stock_ms = {
        code: timing.ms
        for case, timing in zip(cases, timings, strict=True)
        for code in COMPARED
        if case.name == f"stock {code}"
    }
    for case, timing, error in zip(cases, timings, errors, strict=True):
        rate = case.num_bytes / timing.ms / 1e6
        ratios = {f"vs_stock_{code}": ms / timing.ms for code, ms in stock_ms.items()}
        settings = {
            **case.facts,
            **asdict(point),
            "num_kv_heads": grid.num_kv_heads,
            "head_dim": grid.head_dim,
            "repeats": grid.repeats,
            "warm": grid.warm,
            "segment": grid.segment,
        }
        measured = {
            "ms": timing.ms,
            "ms_p20": timing.p20,
            "ms_p80": timing.p80,
            "bytes": case.num_bytes,
            "gb_per_s": rate,
            f"{bandwidth.name}_share": rate / bandwidth.gb_per_s,
            "relative_error": error,
            **ratios,
        }
        text = (
            f"  {case.name:22} {timing.ms:9.3f} ms ({timing.p20:.3f} to {timing.p80:.3f}) "
            f"{rate:7.1f} GB/s {rate / bandwidth.gb_per_s:5.0%} of {bandwidth.name}"
        )
        if bandwidth.peak is not None:
            measured["peak_share"] = rate / bandwidth.peak
            text += f" {rate / bandwidth.peak:5.0%} of peak"
        for code in stock_ms:
            text += f"  {ratios[f'vs_stock_{code}']:5.2f}x of {code}"
        writer.add("attention", settings, measured, text)
