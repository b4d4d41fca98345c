"""What `diffkv report` writes of the rows of `diffkv bench`: a section for each kind, with its plot."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from diffkv.lab import plots
from diffkv.lab.bench.serving import METRICS, PERCENTILES
from diffkv.lab.bench.sweep import RATIOS, begins
from diffkv.lab.bench.throughput import OURS, label
from diffkv.lab.page import NOTHING, Column, Page, number, percent, times
from diffkv.lab.rows import Row
from diffkv.quant import ConfigError

__all__ = ["KINDS", "add_sections", "draw_agent", "draw_map", "draw_serving"]

LATENCIES = (("p95_ttft_ms", "time to first token"), ("p95_tpot_ms", "time per output token"))
MAX_PANELS = 4


def _figure(key: str, digits: int = 1, unit: float = 1.0) -> Callable[[Row], str]:
    """A cell with a figure of a row, in units."""

    def cell(row: Row) -> str:
        value = row.get(key)
        return NOTHING if value is None else number(value / unit, digits)

    return cell


def _share(key: str, digits: int = 1) -> Callable[[Row], str]:
    return lambda row: percent(row.get(key), digits)


def _ratio(key: str) -> Callable[[Row], str]:
    return lambda row: times(row.get(key))


def _span(key: str) -> Callable[[Row], str]:
    """A median with its least and most in brackets."""
    return lambda row: (
        f"{number(row[key])} ({number(row[f'{key}_min'])} to {number(row[f'{key}_max'])})"
    )


def _percentiles(metric: str) -> Callable[[Row], str]:
    return lambda row: " / ".join(number(row.get(f"p{p}_{metric}_ms"), 0) for p in PERCENTILES)


ATTENTION: list[Column[Row]] = [
    ("kernel", label),
    ("tokens", lambda row: f"{row['ctx']:,}{', in rows' if row.get('segment') else ''}"),
    ("requests", lambda row: f"{row['batch']}{', ragged' if row['ragged'] else ''}"),
    ("group", _figure("group", 0)),
    ("ms (20 % to 80 %)", lambda r: f"{r['ms']:.3f} ({r['ms_p20']:.3f} to {r['ms_p80']:.3f})"),
    ("GB/s", _figure("gb_per_s")),
    ("of read or copy", lambda row: percent(row.get("read_share", row.get("copy_share")), 0)),
    ("of peak", _share("peak_share", 0)),
    ("error", _figure("relative_error", 3)),
    ("faster than bf16", _ratio("vs_stock_bf16")),
    ("than fp8", _ratio("vs_stock_fp8")),
]
POOL: list[Column[Row]] = [
    ("operation", lambda row: str(row["op"])),
    ("requests", _figure("num_requests", 0)),
    ("tokens", _figure("ctx", 0)),
    ("layers x heads", lambda row: f"{row['num_layers']} x {row['num_kv_heads']}"),
    ("ms", _figure("ms", 3)),
    ("share", _share("share", 0)),
]
GROWTH: list[Column[Row]] = [
    ("operation", lambda row: str(row["op"])),
    ("grows with", lambda row: str(row["sweep"])),
    ("from, to", lambda row: f"{row['sizes'][0]:,} to {row['sizes'][-1]:,}"),
    ("exponent", _figure("exponent", 2)),
]
OVERHEAD: list[Column[Row]] = [
    ("max_model_len", _figure("max_model_len", 0)),
    ("tables", _share("tables", 2)),
    ("ring", _share("ring", 2)),
    ("half-empty pages", _share("half_empty_pages", 2)),
    ("sum", _share("overhead", 2)),
]
THROUGHPUT: list[Column[Row]] = [
    ("engine", label),
    ("tokens/s", _span("tokens_per_s")),
    ("decoding, tokens/s", _span("decode_tokens_per_s")),
    ("prefill, tokens/s", _figure("prefill_tokens_per_s", 0)),
    ("requests at once", _figure("max_running", 0)),
    ("preempted", _figure("preemptions", 0)),
    ("KV bytes a token", _figure("bytes_per_token", 0)),
    ("high", _share("high_share", 0)),
    ("peak memory, GB", _figure("peak_memory_bytes", 2, 1e9)),
    ("of bf16", _ratio("vs_stock_bf16")),
    ("decoding, of bf16", _ratio("decode_vs_stock_bf16")),
    ("decoding, of fp8", _ratio("decode_vs_stock_fp8")),
    ("prefill, of bf16", _ratio("prefill_vs_stock_bf16")),
]
MAP: list[Column[Row]] = [
    ("engine", label),
    ("KV, MB", _figure("kv_bytes", 0, 1e6)),
    ("prompt tokens", _figure("ctx", 0)),
    ("requests", _figure("requests", 0)),
    ("decoding, tokens/s", _figure("decode_tokens_per_s")),
    ("whole run, tokens/s", _figure("tokens_per_s")),
    ("requests at once", _figure("max_running", 0)),
    *((words, _ratio(key)) for key, words in RATIOS.items()),
]
AGENT: list[Column[Row]] = [
    ("engine", label),
    ("KV, MB", _figure("kv_bytes", 1, 1e6)),
    ("seconds", _figure("seconds")),
    ("tokens/s", _span("tokens_per_s")),
    ("hits", _share("hit_rate")),
    ("first token, ms", _span("mean_ttft_ms")),
    ("p50 / p95", lambda row: f"{row['p50_ttft_ms']:,.0f} / {row['p95_ttft_ms']:,.0f}"),
    ("p50, last turn", lambda row: number(row["p50_ttft_ms_by_turn"][-1], 0)),
    ("requests at once", _figure("max_running", 0)),
    ("preempted", _figure("preemptions", 0)),
    ("KV bytes a token", _figure("bytes_per_token", 0)),
    ("of bf16", _ratio("vs_stock_bf16")),
    ("of fp8", _ratio("vs_stock_fp8")),
    ("first token, of bf16", _ratio("ttft_vs_stock_bf16")),
    ("first token, of fp8", _ratio("ttft_vs_stock_fp8")),
]
CHECK: list[Column[Row]] = [
    ("formats", lambda row: str(row["quant"])),
    ("generated tokens", _figure("tokens", 0)),
    ("as vLLM's own", lambda row: "all" if row["equal"] else "not all"),
    ("hits", _share("hit_rate")),
    ("vLLM's hits", _share("stock_hit_rate")),
]
PROMPT: list[Column[Row]] = [
    ("formats", lambda row: str(row["quant"])),
    ("prompt tokens", _figure("ctx", 0)),
    ("significance, ms", _figure("significance_ms")),
    ("store, ms", _figure("store_prompt_ms")),
    ("vLLM's own prefill, ms", _figure("stock_prefill_ms", 0)),
    ("share", _share("share")),
]
SERVING: list[Column[Row]] = [
    ("engine", label),
    ("requests/s", _figure("rate", 2)),
    ("tokens/s", _figure("output_throughput")),
    *((f"{metric} p50 / p95 / p99 ms", _percentiles(metric)) for metric in METRICS),
    ("good requests/s", _figure("request_goodput", 2)),
]

Rows = Sequence[Row]


def _attention(page: Page, rows: Rows, path: Path | None) -> None:
    page.table(ATTENTION, rows)
    even = [row for row in rows if not row["ragged"] and row.get("vs_stock_bf16")]
    shapes = sorted({(row["batch"], row["group"]) for row in even})[:MAX_PANELS]
    if not shapes or path is None:
        return
    panels = []
    for batch, group in shapes:
        mine = [row for row in even if (row["batch"], row["group"]) == (batch, group)]
        series = _series(mine, "ctx", "vs_stock_bf16")
        title = f"requests: {batch}, group {group}"
        panels.append(plots.Lines(title, "tokens", "times vLLM's bf16 kernel", series, "x"))
    plots.lines(path, panels)
    page.plot(path.name, "speed of decode attention beside vLLM's, by context")


def _series(rows: Rows, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """Points by label."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault(label(row), []).append((row[x], row[y]))
    return series


def _pool(page: Page, rows: Rows, _: object) -> None:
    page.table(POOL, rows)


def _growth(page: Page, rows: Rows, _: object) -> None:
    page.text("Exponents of power laws through the medians:")
    page.table(GROWTH, rows)


def _overhead(page: Page, rows: Rows, _: object) -> None:
    page.text(
        f"What of a budget is not tokens, for requests of {rows[0]['ctx']} tokens in rows of "
        f"{rows[0].get('segment') or 'any length'}:"
    )
    page.table(OVERHEAD, rows)


def _throughput(page: Page, rows: Rows, _: object) -> None:
    loads: dict[str, list[Row]] = {}
    for row in rows:
        load = (
            f"{row['model']}, {row['workload']}, {row['requests']} requests, "
            f"{row['kv_bytes'] / 1e6:,.0f} MB of KV for each engine:"
        )
        loads.setdefault(load, []).append(row)
    for load, here in loads.items():
        page.text(load)
        page.table(THROUGHPUT, here)


def _map(page: Page, rows: Rows, path: Path | None) -> None:
    page.table(MAP, rows)
    page.text("\n".join(f"* {line}" for line in begins(rows)))
    if path is not None:
        draw_map(rows, path)
        page.plot(path.name, "where the gain is")


def draw_map(rows: Rows, path: Path) -> None:
    """Ratios by context and requests: a line of heat-maps for each format and budget.

    Args:
        rows: rows of a map.
        path: PNG file.

    Raises:
        ConfigError: there is no ratio to draw.
    """
    ours = [row for row in rows if row["engine"] == OURS and row.error is None]
    known = {key: words for key, words in RATIOS.items() if any(row.get(key) for row in ours)}
    if not known:
        raise ConfigError(
            "there is nothing to plot: no cell ran with DiffKV and with vLLM's own cache"
        )
    panels = []
    for budget in dict.fromkeys((row["quant"], row["kv_bytes"]) for row in ours):
        mine = [row for row in ours if (row["quant"], row["kv_bytes"]) == budget]
        panels.append([_heat_map(mine, key, words) for key, words in known.items()])
    plots.heat_maps(path, panels)


def _heat_map(rows: Rows, key: str, words: str) -> plots.HeatMap:
    """One ratio by context and requests, for one budget."""
    contexts, requests = (sorted({row[name] for row in rows}) for name in ("ctx", "requests"))
    first = rows[0]
    return plots.HeatMap(
        words,
        "requests",
        f"{first['quant']}, {first['kv_bytes'] / 1e6:.0f} MB\nprompt tokens",
        [str(number) for number in requests],
        [str(ctx) for ctx in contexts],
        {
            (contexts.index(row["ctx"]), requests.index(row["requests"])): row[key]
            for row in rows
            if row.get(key)
        },
        "ratio",
    )


def _prompt(page: Page, rows: Rows, _: object) -> None:
    page.text("What scoring and storing a prompt takes, in all layers:")
    page.table(PROMPT, rows)


def _agent(page: Page, rows: Rows, path: Path | None) -> None:
    first = rows[0]
    grown = first["prompt_tokens_by_turn"][-1] + first["answer_len"]
    page.text(
        f"{first['model']}, {first['conversations']} conversations of {first['turns']} turns over one "
        f"system prompt of {first['system_len']:,} tokens, to {grown:,.0f} tokens:"
    )
    page.table(AGENT, rows)
    if path is not None:
        draw_agent(rows, path)
        page.plot(path.name, "time to first token by turn")


def draw_agent(rows: Rows, path: Path) -> None:
    """Median time to first token by turn, a line for each engine and a panel for each budget."""
    panels = []
    ran = [row for row in rows if row.error is None]
    for kv_bytes in dict.fromkeys(row["kv_bytes"] for row in ran):
        series = {
            label(row): list(enumerate(row["p50_ttft_ms_by_turn"], 1))
            for row in ran
            if row["kv_bytes"] == kv_bytes
        }
        title = f"{kv_bytes / 1e6:,.1f} MB of KV"
        panels.append(plots.Lines(title, "turn", "ms to first token, median", series, "y"))
    plots.lines(path, panels)


def _agent_check(page: Page, rows: Rows, _: object) -> None:
    page.text("Tokens over all turns without loss, in float32:")
    page.table(CHECK, rows)


def _serving(page: Page, rows: Rows, path: Path | None) -> None:
    page.table(SERVING, rows)
    if path is not None:
        draw_serving(rows, path)
        page.plot(path.name, "latency by request rate")


def draw_serving(rows: Rows, path: Path) -> None:
    """Latency (95th percentile) against the request rate, a line for each engine."""
    panels = []
    for key, title in LATENCIES:
        series = _series([row for row in rows if row.get(key) is not None], "rate", key)
        panels.append(plots.Lines(title, "requests/s", "ms, 95th percentile", series, "y"))
    plots.lines(path, panels)


KINDS: dict[str, tuple[str | None, Callable[[Page, Rows, Path | None], None]]] = {
    "attention": ("Decode attention", _attention),
    "pool": ("The pool's own work", _pool),
    "growth": (None, _growth),
    "overhead": (None, _overhead),
    "throughput": ("Offline throughput", _throughput),
    "map": ("Where the gain is", _map),
    "prompt": (None, _prompt),
    "agent": ("Conversations", _agent),
    "agent_check": (None, _agent_check),
    "serving": ("Serving", _serving),
}
"""Heading and body of each kind, in the order of a page; one without heading goes on with the last.

A body gets a page, rows of one machine that all ran, and where its plot goes if one is wanted.
"""


def add_sections(page: Page, rows: Rows, folder: Path, with_plots: bool = True) -> list[str]:
    """Add the sections of all kinds that there are rows of; in each, machines one after the other.

    Args:
        page: grows.
        rows: rows of any kinds; others than those of `KINDS` are left alone.
        folder: where plots go, and the page will be.
        with_plots: whether to draw.

    Returns:
        Names of the plots.
    """
    places = list(dict.fromkeys(row.provenance.device for row in rows if row.kind in KINDS))
    drawn: list[str] = []
    for kind, (heading, body) in KINDS.items():
        mine = [row for row in rows if row.kind == kind]
        if heading is not None and mine:
            page.heading(heading)
        for place in places:
            here = [row for row in mine if row.provenance.device == place]
            ran = [row for row in here if row.error is None]
            if here and heading is not None:
                page.sources(here)
            if ran:
                words = [kind] if len(places) == 1 else [kind, *re.findall(r"\w+", place.lower())]
                path = folder / f"{'-'.join(words)}.png"
                body(page, ran, path if with_plots else None)
                drawn += [path.name] if with_plots and path.exists() else []
            page.failures(here, label)
    return drawn
