"""Where DiffKV gains on vLLM's own cache and where it does not: contexts x requests x KV budget.

A setting has one engine for each budget, and all engines of a budget run a cell in turn before the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffkv.lab.bench.child import in_turn
from diffkv.lab.bench.engine import Job
from diffkv.lab.bench.facts import Rows
from diffkv.lab.bench.throughput import (
    BLOCK_TOKENS,
    Setting,
    Workload,
    bf16_bytes,
    joined,
    random_workload,
    ratios,
)
from diffkv.quant import ConfigError

__all__ = ["RATIOS", "Cell", "Map", "begins", "run"]

RATIOS = {
    "decode_vs_stock_bf16": "decoding, of bf16",
    "decode_vs_stock_fp8": "decoding, of fp8",
    "vs_stock_bf16": "whole run, of bf16",
    "vs_stock_fp8": "whole run, of fp8",
    "prefill_vs_stock_bf16": "prefill, of bf16",
}
"""Ratios that are mapped, more than 1 where DiffKV is faster."""

NO_GAIN = "prefill_vs_stock_bf16"
"""A prompt is not compressed before it was computed: this one can only come near 1."""

GAIN = 1.05
"""A ratio from which on it is called a gain."""

SPARE = 0.9
"""Share of a budget that one request may take: tables and vLLM's null block need the rest."""


@dataclass(frozen=True)
class Cell:
    """Prompts of one length, all there at the start."""

    ctx: int
    requests: int

    def workload(self, output_len: int, vocabulary: int) -> Workload:
        """Random prompts; those of two cells are different."""
        seed = self.ctx << 16 | self.requests
        return random_workload(self.requests, self.ctx, output_len, 0.0, vocabulary, seed)


@dataclass(frozen=True)
class Map:
    """What is measured.

    Attributes:
        contexts: tokens of a prompt.
        requests: how many at once, if they fit.
        budgets: KV bytes.
        output_len: tokens that each request generates.
        repeats: engines of each setting and budget.
        apart: one engine at a time, where memory does not hold all: what a machine's speed does in the
            meantime is then in the ratios.
    """

    contexts: Sequence[int]
    requests: Sequence[int]
    budgets: Sequence[int]
    output_len: int
    repeats: int = 1
    apart: bool = False

    def cells(self, kv_bytes: int, config: dict[str, Any]) -> list[Cell]:
        """Those whose longest request fits into a budget in bf16; vLLM starts with no other."""
        most = int(kv_bytes * SPARE) // bf16_bytes(config)
        return [
            Cell(ctx, requests)
            for ctx in self.contexts
            for requests in self.requests
            if ctx + self.output_len + BLOCK_TOKENS <= most
        ]


def run(
    engine: dict[str, Any],
    config: dict[str, Any],
    wanted: Map,
    compared: Sequence[Setting],
    rows: Rows,
    facts: dict[str, Any],
) -> None:
    """Measure all cells in every setting, a row for each.

    Args:
        engine: arguments of vLLM's engine that all settings share, the model among them.
        config: of the model.
        wanted: the map.
        compared: the settings; ratios are to those named stock.
        rows: gets the rows.
        facts: that belong into every row.

    Raises:
        ConfigError: no cell fits into any budget, or no setting could run.
    """
    for kv_bytes in wanted.budgets:
        cells = wanted.cells(kv_bytes, config)
        if not cells:
            rows.note(f"{kv_bytes} bytes of KV hold no request of the shortest context")
            continue
        rows.note(f"{kv_bytes / 1e6:.0f} MB of KV, {wanted.output_len} tokens out")
        results = _measure(engine, config, wanted, kv_bytes, cells, compared, rows.note)
        for index, cell in enumerate(cells):
            place = {"kv_bytes": kv_bytes, "ctx": cell.ctx, "requests": cell.requests}
            for row in _cell_rows(index, compared, results):
                repeats = {"output_len": wanted.output_len, "repeats": wanted.repeats}
                row = {**facts, **row, **place, **repeats}
                rows.add(row, _text(row))
    if all("error" in row for row in rows.rows):
        reason = rows.rows[0]["error"] if rows.rows else "no budget holds a request"
        raise ConfigError(f"nothing was measured: {reason}")
    for line in begins(rows.rows):
        rows.note(line)


def _measure(
    engine: dict[str, Any],
    config: dict[str, Any],
    wanted: Map,
    kv_bytes: int,
    cells: Sequence[Cell],
    compared: Sequence[Setting],
    say: Callable[[str], None],
) -> list[list[list[dict[str, Any]]]]:
    """What every engine of every setting found in every cell: [setting][repeat][cell]."""
    loads = [cell.workload(wanted.output_len, config["vocab_size"]) for cell in cells]
    shared = {
        "max_model_len": max(load.longest for load in loads) + 1,
        "max_num_seqs": max(cell.requests for cell in cells),
    }
    work = [(load.prompts, load.max_tokens) for load in loads]
    jobs = [
        Job({**shared, **engine, **setting.engine}, setting.options, kv_bytes, work)
        for setting in compared
    ]
    results: list[list[list[dict[str, Any]]]] = [[] for _ in compared]
    for _ in range(wanted.repeats):
        alive = [
            (job, done)
            for job, done in zip(jobs, results, strict=True)
            if not (done and "error" in done[-1][-1])  # one that failed is not started again
        ]
        for group in [[each] for each in alive] if wanted.apart or not alive else [alive]:
            found = in_turn([job for job, _ in group], say)
            for (_, done), each in zip(group, found, strict=True):
                done.append(each)
    return results


def _cell_rows(
    index: int, compared: Sequence[Setting], results: Sequence[Sequence[Sequence[dict[str, Any]]]]
) -> list[dict[str, Any]]:
    """Rows of one cell, with their ratios."""
    found = []
    for setting, done in zip(compared, results, strict=True):
        found.append(joined(setting, [each[index] for each in done]))
    ran = [row for row in found if "error" not in row]
    return [{**row, **ratios(row, ran)} for row in found]


def _text(row: dict[str, Any]) -> str:
    name = row["engine"] if row["engine"] != "diffkv" else f"diffkv {row['quant']}"
    place = f"  {row['ctx']:6} tokens, {row['requests']:3} requests  {name:20}"
    if "error" in row:
        return f"{place} did not run: {row['error']}"
    text = (
        f"{place} decoding {row['decode_tokens_per_s']:7.1f} tokens/s, whole "
        f"{row['tokens_per_s']:7.1f}, at once {row['max_running']:.0f}"
    )
    if row["engine"] == "diffkv":
        known = [
            f"{row[key]:.2f}x {words}" for key, words in RATIOS.items() if row[key] is not None
        ]
        text += f"; {', '.join(known)}"
    return text


def begins(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where the gain begins, in words: a line for each ratio and budget, over all contexts."""
    ours = [row for row in rows if row["engine"] == "diffkv" and "error" not in row]
    places = dict.fromkeys((row["quant"], row["kv_bytes"]) for row in ours)
    texts = []
    for ratio in (ratio for ratio in RATIOS if ratio != NO_GAIN):
        for quant, kv_bytes in places:
            here = [
                r for r in ours if (r["quant"], r["kv_bytes"]) == (quant, kv_bytes) and r[ratio]
            ]
            contexts = [
                f"{ctx} tokens {_begin([(r['requests'], r[ratio]) for r in here if r['ctx'] == ctx])}"
                for ctx in sorted({row["ctx"] for row in here})
            ]
            if contexts:
                place = f"{quant}, {RATIOS[ratio]}, {kv_bytes / 1e6:.0f} MB"
                texts.append(f"{place}: {'; '.join(contexts)}")
    return texts


def _begin(line: Sequence[tuple[int, float]]) -> str:
    """From how many requests on every ratio of a line of (requests, ratio) is a gain."""
    line = sorted(line)
    least = max((requests for requests, ratio in line if ratio < GAIN), default=0)
    gains = [requests for requests, _ in line if requests > least]
    where = f"from {gains[0]} requests on" if gains else "nowhere"
    return f"{where} ({', '.join(f'{ratio:.2f}' for _, ratio in line)})"
