"""Where DiffKV gains on vLLM's own cache and where it does not: contexts x requests x KV budgets.

A setting has one engine for each budget, and all engines of a budget run a cell in turn before the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffkv.lab.bench.child import in_rounds
from diffkv.lab.bench.engine import Job
from diffkv.lab.bench.throughput import (
    BLOCK_TOKENS,
    OURS,
    Setting,
    Workload,
    add_rows,
    bf16_bytes,
    label,
    random_workload,
)
from diffkv.lab.rows import Row, Writer
from diffkv.quant import ConfigError

__all__ = ["RATIOS", "Cell", "Sweep", "begins", "run"]

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
class Sweep:
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
    wanted: Sweep,
    compared: Sequence[Setting],
    writer: Writer,
    facts: dict[str, Any],
) -> list[Row]:
    """Measure all cells in every setting, a row for each.

    Args:
        engine: arguments of vLLM's engine that all settings share, the model among them.
        config: the model's `config.json`.
        wanted: what to measure.
        compared: settings; ratios are to those named stock.
        writer: gets the rows.
        facts: settings that belong into every row.

    Returns:
        The rows.

    Raises:
        ConfigError: no cell fits into any budget, or no setting could run.
    """
    added: list[Row] = []
    for kv_bytes in wanted.budgets:
        cells = wanted.cells(kv_bytes, config)
        if not cells:
            writer.note(f"{kv_bytes} bytes of KV hold no request of the shortest context")
            continue
        writer.note(f"{kv_bytes / 1e6:.0f} MB of KV, {wanted.output_len} tokens out")
        results = _measure(engine, config, wanted, kv_bytes, cells, compared, writer.note)
        for index, cell in enumerate(cells):
            case = {**facts, "kv_bytes": kv_bytes, **asdict(cell)}
            case |= {"output_len": wanted.output_len, "repeats": wanted.repeats}
            here = [[each[index] for each in done] for done in results]
            added += add_rows(writer, "map", case, compared, here, _text)
    if all(row.error is not None for row in added):
        reason = added[0].error if added else "no budget holds a request"
        raise ConfigError(f"nothing was measured: {reason}")
    for line in begins(added):
        writer.note(line)
    return added


def _measure(
    engine: dict[str, Any],
    config: dict[str, Any],
    wanted: Sweep,
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
    work = [load.load for load in loads]
    jobs = [
        Job({**shared, **engine, **setting.engine}, setting.options, kv_bytes, work)
        for setting in compared
    ]
    return in_rounds(jobs, wanted.repeats, wanted.apart, say)


def _text(row: Row) -> str:
    place = f"  {row['ctx']:6} tokens, {row['requests']:3} requests  {label(row):20}"
    if row.error is not None:
        return f"{place} did not run: {row.error}"
    text = (
        f"{place} decoding {row['decode_tokens_per_s']:7.1f} tokens/s, whole "
        f"{row['tokens_per_s']:7.1f}, at once {row['max_running']:.0f}"
    )
    if row["engine"] == OURS:
        known = [f"{row[key]:.2f}x {words}" for key, words in RATIOS.items() if row.get(key)]
        text += f"; {', '.join(known)}"
    return text


def begins(rows: Sequence[Row]) -> list[str]:
    """Where the gain begins, in words: a line for each ratio and budget, over all contexts."""
    ours = [row for row in rows if row["engine"] == OURS and row.error is None]
    places = dict.fromkeys((row["quant"], row["kv_bytes"]) for row in ours)
    texts = []
    for ratio in (ratio for ratio in RATIOS if ratio != NO_GAIN):
        for quant, kv_bytes in places:
            here = [
                r for r in ours if (r["quant"], r["kv_bytes"]) == (quant, kv_bytes) and r.get(ratio)
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
    """The number of requests from which on every ratio of a line of (requests, ratio) is a gain."""
    line = sorted(line)
    least = max((requests for requests, ratio in line if ratio < GAIN), default=0)
    gains = [requests for requests, _ in line if requests > least]
    where = f"from {gains[0]} requests on" if gains else "nowhere"
    return f"{where} ({', '.join(f'{ratio:.2f}' for _, ratio in line)})"
