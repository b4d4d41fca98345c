"""Plots of rows; matplotlib is imported only here."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffkv.quant import ConfigError

__all__ = ["plot_attention", "plot_serving"]

DPI = 120
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


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
