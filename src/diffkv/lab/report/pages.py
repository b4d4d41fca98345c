"""A report: tables of methods by task, of methods by model, of distances, and their plots."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from diffkv.lab import plots
from diffkv.lab.bench.pages import add_sections
from diffkv.lab.evaluation.results import Method, TaskScore
from diffkv.lab.page import Column, Page, file_name, number, percent, times, write_csv
from diffkv.lab.report.distances import add_distances, flat
from diffkv.lab.report.heads import draw_heads
from diffkv.lab.report.load import Loaded
from diffkv.lab.report.summary import Place, Summary, by_place, overall, summaries

__all__ = ["write"]

REPORT = "report.md"
MARKERS = {"paper": "o", "none": "X", "window": "s", "topk": "^", "random": "v"}
"""Marker of a policy: the same in every plot."""

LEAST_FULL = 0.8
"""Share of a generated task that full precision does: of one that it fails, a loss says nothing."""

NOTES = """\
B/token: real bytes of the KV budget, whole pages and tables included; *vs bf16* is the ratio by them,
*nominal* the one by bits of codes alone. Differences are points of accuracy, compressed minus full
precision on the same samples, with their 95 % interval: of one seed a paired bootstrap over samples,
of several Student's over their means. The interval of a mean over tasks is the mean of the tasks'
intervals, which is too wide rather than too narrow."""


def _points(score: TaskScore) -> str:
    ends = f"{100 * score.ci95_low:+.1f} to {100 * score.ci95_high:+.1f}"
    return f"{100 * score.difference:+.1f} ({ends})"


SPENT: list[Column[Summary]] = [
    ("method", lambda row: row.method.label()),
    ("B/token", lambda row: number(row.score.bytes_per_token)),
    ("vs bf16", lambda row: times(row.score.ratio_bf16)),
    ("nominal", lambda row: times(row.score.nominal_ratio_bf16)),
]
"""Columns that every table of methods begins with."""

MEANS: list[Column[Summary]] = [
    *SPENT,
    ("high", lambda row: percent(row.score.high)),
    ("low", lambda row: percent(row.score.low)),
    ("dropped", lambda row: percent(row.score.dropped)),
    ("n", lambda row: str(row.score.n)),
    ("accuracy", lambda row: percent(row.score.accuracy)),
    ("difference", lambda row: _points(row.score)),
]


def _by_bytes(group: Sequence[Summary]) -> list[Summary]:
    return sorted(group, key=lambda summary: summary.score.bytes_per_token)


def _columns(names: Sequence[str], cells: dict[tuple[Method, str], str]) -> list[Column[Summary]]:
    """A column for each name; of names that are paths the last part is shown."""
    return [(name.split("/")[-1], partial(_cell_of, cells, name)) for name in names]


def _cell_of(cells: dict[tuple[Method, str], str], name: str, row: Summary) -> str:
    return cells.get((row.method, name), "")


def _worst(scores: Sequence[TaskScore]) -> TaskScore:
    return min(scores, key=lambda score: score.difference)


def _compare_models(page: Page, found: Sequence[Summary]) -> None:
    """Methods by model in one suite and setting: the mean over tasks, and the worst of them."""
    means, worst = overall(found), overall(found, _worst)
    models = list(dict.fromkeys(mean.method.model for mean in means))
    lines: dict[Method, Summary] = {}
    cells: dict[tuple[Method, str], str] = {}
    for mean, least in zip(means, worst, strict=True):
        method = replace(mean.method, model="")
        lines.setdefault(method, replace(mean, method=method))
        lost = 100 * mean.score.difference, 100 * least.score.difference
        cells[method, mean.method.model] = "{:+.1f} ({:+.1f})".format(*lost)
    page.heading(f"All models: {', '.join(means[0].place[1:])}")
    page.text(
        "Points of accuracy against full precision, the mean over tasks and, in brackets, the worst of "
        f"them; bytes in {models[0]}."
    )
    page.table([*SPENT, *_columns(models, cells)], lines.values())


def _section(page: Page, place: Place, group: Sequence[Summary], is_compared: bool) -> None:
    """One model, suite and setting: means over tasks unless models were compared, then every task."""
    tasks = list(dict.fromkeys(summary.score.task for summary in group))
    means = _by_bytes(overall(group))
    full = sum(summary.score.accuracy_full for summary in group) / len(group)
    page.heading(f"{place[0]}: {', '.join(place[1:])}")
    page.text(f"Full precision is right in {percent(full)}.")
    if not is_compared:
        page.text(f"Means over {', '.join(tasks)}:")
        page.table(MEANS, means)
    if is_compared or len(tasks) > 1:
        cells = {(row.method, row.score.task): _points(row.score) for row in group}
        page.text("Differences by task:")
        page.table([MEANS[0], *_columns(tasks, cells)], means)


def _without_failed(page: Page, found: Sequence[Summary]) -> list[Summary]:
    """Scores of the tasks that full precision can do; the page names the others."""
    failed = {
        (*row.place, row.score.task): row.score.accuracy_full
        for row in found
        if row.suite == "synth" and row.score.accuracy_full < LEAST_FULL
    }
    if failed:
        names = (
            f"{task} ({setting}, {percent(full)})"
            for (_, _, setting, _, task), full in failed.items()
        )
        page.text(
            f"Not shown, because full precision is right in less than {LEAST_FULL:.0%} of them: "
            f"{', '.join(names)}."
        )
    return [row for row in found if (*row.place, row.score.task) not in failed]


def _draw_pareto(folder: Path, place: Place, group: Sequence[Summary]) -> str:
    """Accuracy against real bytes of a token, all methods."""
    name = file_name("pareto", *place)
    points = []
    for mean in overall(group):
        score, marker = mean.score, MARKERS.get(mean.method.policy.split(":")[0], "D")
        low, high = (100 * (score.accuracy_full + end) for end in (score.ci95_low, score.ci95_high))
        label, y = mean.method.label(), 100 * score.accuracy
        points.append(plots.Point(label, score.bytes_per_token, y, low, high, marker))
    full = 100 * max(row.score.accuracy_full for row in overall(group))
    plots.pareto(
        folder / name,
        ", ".join(place),
        "bytes of a token, whole pages and tables",
        "accuracy, %",
        points,
        full,
    )
    return name


def _flat(summary: Summary) -> dict[str, object]:
    """One line of a CSV file."""
    own = {"suite": summary.suite, "asked": summary.asked, "seeds": summary.seeds}
    return {**vars(summary.method), **own, **vars(summary.score)}


def write(
    loaded: Loaded, folder: Path, with_plots: bool = True, with_csv: bool = False
) -> list[str]:
    """Write a report, its plots and its tables for other programs.

    Args:
        loaded: the results.
        folder: exists.
        with_plots: whether to draw.
        with_csv: whether to write tasks.csv and distances.csv, those that have rows.

    Returns:
        Names of the files.
    """
    page, written = Page("Results"), [REPORT]
    tasks = _without_failed(page, summaries(loaded.tasks))

    def plot(name: str, text: str) -> None:
        written.append(name)
        page.plot(name, text)

    places = by_place(tasks)
    for where in dict.fromkeys(place[1:] for place in places):
        groups = {place: group for place, group in places.items() if place[1:] == where}
        if len(groups) > 1:
            _compare_models(page, [summary for group in groups.values() for summary in group])
        for place, group in groups.items():
            _section(page, place, group, len(groups) > 1)
            if with_plots:
                plot(_draw_pareto(folder, place, group), f"Accuracy and bytes: {', '.join(place)}")
    written += add_distances(page, loaded.distances, loaded.failed, folder, with_plots)
    for index, row in enumerate(loaded.heads):
        if with_plots:
            name = file_name("heads", row["model"], str(index))
            draw_heads(folder / name, row)
            plot(name, f"Tiers of each head: {row['model']}")
    written += add_sections(page, loaded.bench, folder, with_plots)
    if own := [row for row in loaded.rows if row not in loaded.bench]:
        page.heading("Where it comes from")
        if tasks:
            page.text(NOTES)
        page.sources(own)
    page.write(folder / REPORT)
    near = [flat(row, score) for row, cells in loaded.distances for score in cells]
    for name, lines in (("tasks.csv", list(map(_flat, tasks))), ("distances.csv", near)):
        if with_csv and lines:
            write_csv(folder / name, lines)
            written.append(name)
    return written
