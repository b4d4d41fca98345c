"""Plots of a report, as PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from diffkv.lab.report.load import Heads, Loaded
from diffkv.lab.report.summary import (
    Divergence,
    Score,
    divergences,
    methods_of,
    overall,
    scores,
)

__all__ = ["draw"]

DPI = 120
TIERS = ("high", "low", "dropped")


def _markers(policy: str) -> str:
    """Marker of a policy: the same in every plot."""
    names = ("paper", "none", "window", "topk", "random")
    base = policy.split(":")[0]
    return "oXs^v"[names.index(base)] if base in names else "D"


def _pareto(rows: Sequence[Score], title: str) -> Figure:
    """Accuracy against real bytes of a token, all methods; the frontier is joined."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        y = 100 * row.accuracy
        low, high = (100 * (row.accuracy_full + end) for end in row.ci95)
        axes.errorbar(
            row.bytes_per_token, y, yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
            marker=_markers(row.method.policy), capsize=3, linestyle="none",
            label=row.method.label(),
        )  # fmt: skip
    best = -1.0
    frontier = []
    for row in sorted(rows, key=lambda row: (row.bytes_per_token, -row.accuracy)):
        if row.accuracy > best:
            best = row.accuracy
            frontier.append((row.bytes_per_token, 100 * row.accuracy))
    axes.plot(*zip(*frontier, strict=True), color="0.6", linewidth=1, zorder=0)
    full = max(100 * row.accuracy_full for row in rows)
    axes.axhline(full, color="0.3", linestyle="--", linewidth=1, label="full precision")
    axes.set_xlabel("bytes of a token, whole pages and tables")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _loss_by_task(rows: Sequence[Score], title: str) -> Figure:
    """Accuracy lost, for each task a group of bars, for each method one."""
    methods, tasks = methods_of(rows), list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(max(6, 1 + len(tasks) * (0.4 + 0.25 * len(methods))), 4.5),
                    layout="constrained")  # fmt: skip
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        mine = {row.task: row for row in rows if row.method == method}
        places = [place for place, task in enumerate(tasks) if task in mine]
        shown = [mine[tasks[place]] for place in places]
        losses = [-100 * row.difference for row in shown]
        below = [
            max(0.0, loss + 100 * row.ci95[1]) for loss, row in zip(losses, shown, strict=True)
        ]
        above = [
            max(0.0, -loss - 100 * row.ci95[0]) for loss, row in zip(losses, shown, strict=True)
        ]
        at = [place + (index - (len(methods) - 1) / 2) * width for place in places]
        axes.bar(at, losses, width, yerr=[below, above], capsize=2, label=method.label())
    axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right")
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_ylabel("accuracy lost, points")
    axes.set_title(title)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _kld_bars(rows: Sequence[Divergence], title: str) -> Figure:
    """Mean, median and 99.9 % of the KL divergence, logarithmic."""
    figure = Figure(figsize=(max(6, 1.5 + 1.1 * len(rows)), 4.5), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(rows, key=lambda row: row.bytes_per_token)
    for index, (name, label) in enumerate(
        (("kld_median", "median"), ("kld_mean", "mean"), ("kld_p999", "99.9 %"))
    ):
        values = [getattr(row, name) for row in ordered]
        axes.bar([place + (index - 1) * 0.27 for place in range(len(values))], values, 0.27,
                 label=label)  # fmt: skip
    if any(row.kld_p999 > 0 for row in ordered):
        axes.set_yscale("log")
    labels = [f"{row.method.label()}\n{row.bytes_per_token:.0f} B/token" for row in ordered]
    axes.set_xticks(range(len(ordered)), labels, rotation=20, ha="right", fontsize="x-small")
    axes.set_ylabel("KL(full || compressed), nats")
    axes.set_title(title)
    axes.legend(fontsize="small")
    return figure


def _heads(heads: Heads) -> Figure:
    """Share of tokens of each tier, a row for each layer, a column for each KV head."""
    tiers = [tier for tier in TIERS if tier in heads.shares]
    num_layers, num_heads = len(heads.shares[tiers[0]]), len(heads.shares[tiers[0]][0])
    size = (max(3.0, 0.35 * num_heads + 2) * len(tiers), max(3.0, 0.25 * num_layers + 1.5))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(tiers), squeeze=False)[0]
    for panel, tier in zip(panels, tiers, strict=True):
        image = panel.imshow(
            [[100 * share for share in row] for row in heads.shares[tier]],
            vmin=0, vmax=100, cmap="Blues", aspect="auto",
        )  # fmt: skip
        panel.set_title(tier)
        panel.set_xlabel("KV head")
        panel.set_ylabel("layer")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=panels, label="% of tokens")
    figure.suptitle(
        f"{heads.model}: {heads.quant}, alpha_high {heads.alpha_high:g}, alpha_low "
        f"{heads.alpha_low:g}, {heads.num_tokens} tokens",
        fontsize="small",
    )
    return figure


def _by_place(rows: Sequence[Score]) -> dict[tuple[str, str, str], list[Score]]:
    places: dict[tuple[str, str, str], list[Score]] = {}
    for row in rows:
        places.setdefault((row.method.model, row.suite, row.setting), []).append(row)
    return places


def _file_name(*words: str) -> str:
    """A name that any file system takes."""
    kept = "-".join(words).replace("/", "-").lower()
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in kept).strip("-.") + ".png"


def draw(loaded: Loaded, folder: Path) -> list[str]:
    """Draw what there are results for.

    Returns:
        Names of the files, in the order of the report.
    """
    figures: list[tuple[str, Callable[[], Figure]]] = []

    def add(name: str, make: Callable[..., Figure], *arguments: Any) -> None:
        figures.append((name, lambda: make(*arguments)))

    rows = scores(loaded.runs)
    for place, group in _by_place(overall(rows)).items():
        add(_file_name("pareto", *place), _pareto, group, ", ".join(place))
    for place, group in _by_place(rows).items():
        add(_file_name("loss", *place), _loss_by_task, group, ", ".join(place))
    by_mode: dict[tuple[str, str], list[Divergence]] = {}
    for row in divergences(loaded.runs):
        by_mode.setdefault((row.method.model, row.mode), []).append(row)
    for mode, distances in by_mode.items():
        add(_file_name("kld", *mode), _kld_bars, distances, ", ".join(mode))
    for number, heads in enumerate(loaded.heads):
        add(_file_name("heads", heads.model, str(number)), _heads, heads)
    for name, make in figures:
        make().savefig(folder / name, dpi=DPI)
    return [name for name, _ in figures]
