"""Draws PNGs of figures: lines, a Pareto front, bars, heat-maps. Nothing else imports matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from diffkv.quant import ConfigError

__all__ = [
    "Bar",
    "HeatMap",
    "Lines",
    "Point",
    "Spot",
    "bars",
    "heat_maps",
    "lines",
    "pareto",
    "require",
    "spots",
]

DPI = 100
COLOURS = 64
"""Colours of a PNG: enough for lines and text, a third of the bytes."""

NAME_DISTANCES = (6, 14, 24, 36, 50)
NAME_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""Where the name of a point may be: points of space away from it, to the right, to the left, above, …"""

RATIO_SPAN = (0.25, 4.0)
"""Ratios that have the two ends of the colours."""


@dataclass(frozen=True)
class Lines:
    """One panel of lines.

    Attributes:
        title: above it.
        x: label of the axis.
        y: likewise.
        series: points (x, y) of each line, at least one, by its name in the legend.
        log: axes that are logarithmic: "", "x", "y" or "xy"; such an x has a mark at each point.
    """

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    log: str = ""


@dataclass(frozen=True)
class Point:
    """A point of a Pareto plot, with the interval of its y."""

    name: str
    x: float
    y: float
    low: float
    high: float
    marker: str = "o"


@dataclass(frozen=True)
class Spot:
    """A point with its name beside it."""

    name: str
    x: float
    y: float
    marker: str


@dataclass(frozen=True)
class Bar:
    """A bar, with the interval of its value if there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class HeatMap:
    """One panel of cells.

    Attributes:
        title: above it.
        x: label of the axis of columns.
        y: label of the axis of rows.
        columns: names.
        rows: names, the first at the top.
        cells: values by (row, column) index; missing ones stay white.
        colours: "share" for 0 to 1, shown as percent on a scale; "ratio" for factors around 1, each
            written into its cell.
    """

    title: str
    x: str
    y: str
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Mapping[tuple[int, int], float] = field(default_factory=dict)
    colours: Literal["share", "ratio"] = "share"


def require() -> None:
    """Check that plots can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'diffkv[plot]'") from None


def lines(path: Path, panels: Sequence[Lines]) -> None:
    """Panels side by side, with one legend."""
    figure = _figure(4.2 * len(panels) + 2.4, 4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    for axis, panel in zip(axes, panels, strict=True):
        for name, points in panel.series.items():
            colour = f"C{names.index(name) % 10}"
            axis.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                markersize=4,
                color=colour,
                label=name,
            )
        axis.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
        axis.set_yscale("log" if "y" in panel.log else "linear")
        if "x" in panel.log:
            places = sorted({x for points in panel.series.values() for x, _ in points})
            axis.set_xscale("log")
            axis.set_xticks(places, [f"{x:g}" for x in places], minor=False)
            axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    handles = {
        name: handle
        for axis in axes
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")
    _save(figure, path)


def pareto(
    path: Path, title: str, x: str, y: str, points: Sequence[Point], full: float | None = None
) -> None:
    """Points of which less x and more y is better; the best at each x are joined.

    Args:
        path: PNG file.
        title: above it.
        x: label of the axis.
        y: likewise.
        points: to be drawn, each in the legend.
        full: y of full precision, drawn as a line.
    """
    figure = _figure(8, 5)
    axes = figure.subplots()
    for point in points:
        ends = [[max(0.0, point.y - point.low)], [max(0.0, point.high - point.y)]]
        axes.errorbar(
            point.x,
            point.y,
            yerr=ends,
            marker=point.marker,
            capsize=3,
            linestyle="none",
            label=point.name,
        )
    _join_best(axes, points, 1)
    if full is not None:
        axes.axhline(full, color="0.3", linestyle="--", linewidth=1, label="full precision")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def spots(
    path: Path,
    title: str,
    x: str,
    y: str,
    points: Sequence[Spot],
    names: Mapping[str, str],
) -> None:
    """Named points of which less x and less y is better, on logarithmic axes; the best are joined.

    Args:
        path: PNG file.
        title: above it.
        x: label of the axis.
        y: likewise.
        points: to be drawn.
        names: what each marker stands for.
    """
    figure = _figure(10, 7)
    axes = figure.subplots()
    for index, (marker, name) in enumerate(names.items()):
        mine = [point for point in points if point.marker == marker]
        if mine:
            places = [p.x for p in mine], [p.y for p in mine]
            axes.plot(*places, marker, color=f"C{index}", label=name)
    _join_best(axes, points, -1)
    axes.set(xlabel=x, ylabel=y, title=title, xscale="log", yscale="log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    axes.legend()
    _write_names(figure, axes, points)
    _save(figure, path)


def _join_best(axes: Any, points: Sequence[Point | Spot], sign: int) -> None:
    """Join the best points at each x: of 1 those with more y, of -1 those with less."""
    front: list[Point | Spot] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * point.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    axes.plot([p.x for p in front], [p.y for p in front], color="0.6", linewidth=1, zorder=0)


def _write_names(figure: Any, axes: Any, points: Sequence[Spot]) -> None:
    """Write names beside points, each at the nearest place where it covers no marker and no name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # lays the axes out
    dots = axes.transData.transform([(point.x, point.y) for point in points])
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    for point in points:
        for away, (dx, dy) in product(NAME_DISTANCES, NAME_SIDES):
            name = axes.annotate(
                point.name,
                (point.x, point.y),
                (dx * away, dy * away),
                textcoords="offset points",
                ha=("center", "left", "right")[dx],
                va=("center", "bottom", "top")[dy],
                fontsize=7,
            )
            box = name.get_window_extent(canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken):
                break
            name.remove()
        else:
            continue  # no room: the table beside the plot has it
        taken.append(box)
        if away > NAME_DISTANCES[0]:
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5}
            ends = (point.x, point.y), (dx * away, dy * away)
            axes.annotate("", *ends, textcoords="offset points", arrowprops=line)


def bars(
    path: Path, title: str, y: str, series: Mapping[str, Mapping[str, Bar]], log: bool = False
) -> None:
    """Groups of bars side by side, in each a bar for every series that has one.

    Args:
        path: PNG file.
        title: above it.
        y: label of the axis.
        series: bars by group, by the name in the legend.
        log: whether the axis is logarithmic.
    """
    groups = list(dict.fromkeys(group for mine in series.values() for group in mine))
    figure = _figure(max(6, 1 + len(groups) * (0.4 + 0.25 * len(series))), 4.5)
    axes = figure.subplots()
    width = 0.8 / len(series)
    for index, (name, mine) in enumerate(series.items()):
        at = [groups.index(group) + (index - (len(series) - 1) / 2) * width for group in mine]
        values = [bar.value for bar in mine.values()]
        below = [0.0 if bar.low is None else max(0.0, bar.value - bar.low) for bar in mine.values()]
        above = [
            0.0 if bar.high is None else max(0.0, bar.high - bar.value) for bar in mine.values()
        ]
        ends = [below, above] if any(below + above) else None
        axes.bar(at, values, width, yerr=ends, capsize=2, label=name)
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right", fontsize="small")
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(ylabel=y, title=title, yscale="log" if log else "linear")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def heat_maps(path: Path, maps: Sequence[Sequence[HeatMap]], title: str | None = None) -> None:
    """Lines of panels, all with the same colours."""
    width = max(3.0, 1.5 + 0.5 * max(len(each.columns) for line in maps for each in line))
    height = max(2.0, 1.2 + 0.3 * max(len(each.rows) for line in maps for each in line))
    across = max(len(line) for line in maps)
    figure = _figure(width * across, height * len(maps))
    panels = figure.subplots(len(maps), across, squeeze=False)
    image = None
    for axes, line in zip(panels, maps, strict=True):
        for axis in axes[len(line) :]:
            axis.set_axis_off()
        for axis, each in zip(axes, line, strict=False):
            image = _heat_map(axis, each)
    if image is not None and maps[0][0].colours == "share":
        figure.colorbar(image, ax=panels, label="%")
    if title is not None:
        figure.suptitle(title, fontsize="small")
    _save(figure, path)


def _heat_map(axis: Any, each: HeatMap) -> Any:
    from matplotlib.colors import LogNorm

    is_share = each.colours == "share"
    factor = 100 if is_share else 1
    cells = [
        [each.cells.get((row, column), math.nan) * factor for column in range(len(each.columns))]
        for row in range(len(each.rows))
    ]
    look = {"vmin": 0, "vmax": 100, "cmap": "Blues"}
    if not is_share:
        look = {"norm": LogNorm(*RATIO_SPAN), "cmap": "RdBu"}
        least, most = (math.sqrt(end) for end in RATIO_SPAN)
        for (row, column), value in each.cells.items():
            ink = "black" if least < value < most else "white"
            axis.text(column, row, f"{value:.2f}", fontsize=8, ha="center", va="center", color=ink)
    image = axis.imshow(cells, aspect="auto", **look)
    for name, labels in (("x", each.columns), ("y", each.rows)):
        step = max(1, len(labels) // 16)
        places = range(0, len(labels), step)
        getattr(axis, f"set_{name}ticks")(places, [labels[i] for i in places], fontsize=8)
    axis.set_title(each.title, fontsize=9)
    axis.set_xlabel(each.x, fontsize=8)
    axis.set_ylabel(each.y, fontsize=8)
    return image


def _figure(width: float, height: float) -> Any:
    require()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """Write a PNG of few colours; matplotlib brings Pillow along."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    image = Image.open(drawn).convert("RGB").quantize(COLOURS)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", optimize=True)
