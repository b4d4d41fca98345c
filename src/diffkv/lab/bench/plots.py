"""Plots of rows; matplotlib is imported only here."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffkv.quant import ConfigError

__all__ = ["plot_attention", "plot_map", "plot_serving"]

DPI = 120
RATIO_SPAN = (0.25, 4.0)
"""Ratios that have the two ends of the colours."""

LATENCIES = (("p95_ttft_ms", "time to first token"), ("p95_tpot_ms", "time per output token"))


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'diffkv[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def label(row: dict[str, Any]) -> str:
    """Name of a row's kernel or engine."""
    engine = row.get("engine")
    if engine is None:
        stock = row.get("tiers") is None
        return f"vLLM {row['quant']}" if stock else f"{row['quant']}, {row['tiers']}"
    return engine if engine != "diffkv" else f"diffkv {row['quant']}"


def plot_serving(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Latency (95th percentile) against the request rate, a line for each engine."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(LATENCIES), figsize=(10, 4))
    for axis, (key, title) in zip(axes, LATENCIES, strict=True):
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            if row.get(key) is not None:
                lines[label(row)].append((row["rate"], row[key]))
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(xlabel="requests/s", ylabel="ms, 95th percentile", title=title, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    _save(pyplot, figure, path)


def plot_attention(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed of decode attention against vLLM's bf16 kernel, by context, a line for each kernel."""
    pyplot = _pyplot()
    rows = [row for row in rows if not row["ragged"] and row.get("vs_stock_bf16")]
    batches = sorted({(row["batch"], row["group"]) for row in rows})
    figure, axes = pyplot.subplots(
        1, len(batches), figsize=(4 * len(batches), 4), sharey=True, squeeze=False
    )
    for axis, (batch, group) in zip(axes[0], batches, strict=True):
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            if (row["batch"], row["group"]) == (batch, group):
                lines[label(row)].append((row["ctx"], row["vs_stock_bf16"]))
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(xlabel="tokens", xscale="log", title=f"{batch} requests, group {group}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("times vLLM's bf16 kernel")
    axes[0][-1].legend()
    _save(pyplot, figure, path)


def plot_map(rows: Sequence[dict[str, Any]], ratios: dict[str, str], path: Path) -> None:
    """Ratios by context and requests: a line of heat-maps for each budget, one for each ratio.

    Args:
        rows: of the map.
        ratios: fields of a row that are drawn, and what they are called.
        path: of the PNG.
    """
    pyplot = _pyplot()
    ours = [row for row in rows if row["engine"] == "diffkv" and "error" not in row]
    known = {key: words for key, words in ratios.items() if any(row[key] for row in ours)}
    budgets = list(dict.fromkeys((row["quant"], row["kv_bytes"]) for row in ours))
    width = 1 + 0.6 * len({row["requests"] for row in ours})
    height = 1.2 + 0.5 * len({row["ctx"] for row in ours})
    figure, axes = pyplot.subplots(
        len(budgets), len(known), squeeze=False,
        figsize=(width * len(known), height * len(budgets)),
    )  # fmt: skip
    for line, (quant, kv_bytes) in zip(axes, budgets, strict=True):
        mine = [row for row in ours if (row["quant"], row["kv_bytes"]) == (quant, kv_bytes)]
        for axis, (key, words) in zip(line, known.items(), strict=True):
            _heat_map(axis, {(row["ctx"], row["requests"]): row[key] for row in mine})
            axis.set_title(words, fontsize=9)
            axis.set_xlabel("requests", fontsize=8)
        line[0].set_ylabel(f"{quant}\n{kv_bytes / 1e6:.0f} MB of KV\nprompt tokens", fontsize=8)
    _save(pyplot, figure, path)


def _heat_map(axis: Any, places: dict[tuple[int, int], float | None]) -> None:
    """Ratios by (context, requests); blue is more than 1. What was not measured stays white."""
    from matplotlib.colors import LogNorm

    contexts, requests = (sorted({place[i] for place in places}) for i in (0, 1))
    cells = [[places.get((ctx, num)) or float("nan") for num in requests] for ctx in contexts]
    least, most = RATIO_SPAN
    axis.imshow(cells, cmap="RdBu", norm=LogNorm(least, most), origin="lower", aspect="auto")
    for (ctx, num), value in places.items():
        if value:
            inside = math.sqrt(least) < value < math.sqrt(most)
            axis.text(requests.index(num), contexts.index(ctx), f"{value:.2f}", fontsize=8,
                      ha="center", va="center", color="black" if inside else "white")  # fmt: skip
    axis.set_xticks(range(len(requests)), requests, fontsize=8)
    axis.set_yticks(range(len(contexts)), contexts, fontsize=8)


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
