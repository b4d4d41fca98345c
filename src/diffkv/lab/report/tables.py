"""Tables of a report, as Markdown for readers and as CSV for machines."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffkv.lab.report.load import Loaded
from diffkv.lab.report.summary import Divergence, Method, Score, divergences, overall, scores

__all__ = ["markdown", "write_csv"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(row: Score) -> str:
    low, high = row.ci95
    return f"{100 * row.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _score_rows(rows: Sequence[Score], with_task: bool) -> str:
    header = ["method", "B/token", "vs bf16", "nominal", "high %", "low %", "dropped %", "n", "seeds",
              "accuracy %", "full %", "difference, points (95 %)"]  # fmt: skip
    cells = [
        [
            row.method.label(), f"{row.bytes_per_token:.1f}", f"{row.ratio_bf16:.2f}",
            f"{row.nominal_ratio_bf16:.2f}", _percent(row.high), _percent(row.low),
            _percent(row.dropped), str(row.n), str(row.seeds), _percent(row.accuracy),
            _percent(row.accuracy_full), _points(row),
        ]
        for row in sorted(rows, key=lambda row: (row.task, row.bytes_per_token))
    ]  # fmt: skip
    if with_task:
        ordered = sorted(rows, key=lambda row: (row.task, row.bytes_per_token))
        cells = [[row.task, *line] for row, line in zip(ordered, cells, strict=True)]
        header = ["task", *header]
    return _table(header, cells)


def _kld_rows(rows: Sequence[Divergence]) -> str:
    header = ["method", "B/token", "vs bf16", "n", "seeds", "KLD mean", "median", "99.9 %",
              "same top-1 %", "first divergence"]  # fmt: skip
    cells = [
        [
            row.method.label(), f"{row.bytes_per_token:.1f}", f"{row.ratio_bf16:.2f}", str(row.n),
            str(row.seeds), f"{row.kld_mean:.3g}", f"{row.kld_median:.3g}", f"{row.kld_p999:.3g}",
            _percent(row.same_top1), f"{row.first_divergence:.1f}",
        ]
        for row in sorted(rows, key=lambda row: row.bytes_per_token)
    ]  # fmt: skip
    return _table(header, cells)


def _places(rows: Sequence[Score]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((row.method.model, row.suite, row.setting) for row in rows))


def markdown(loaded: Loaded, plots: Sequence[str]) -> str:
    """The whole report.

    Args:
        loaded: the results.
        plots: names of the pictures beside it.
    """
    parts = ["# Results\n\nWritten by `diffkv report`.\n\n"]
    rows = scores(loaded.runs)
    means = overall(rows)
    for model, suite, setting in _places(rows):
        here = [row for row in rows if (row.method.model, row.suite, row.setting) ==
                (model, suite, setting)]  # fmt: skip
        mean = [row for row in means if (row.method.model, row.suite, row.setting) ==
                (model, suite, setting)]  # fmt: skip
        parts.append(f"## {model}: {suite}, {setting}\n\n")
        if len({row.task for row in here}) > 1:
            parts += [_score_rows(mean, with_task=False), "\n"]
        parts += [_score_rows(here, with_task=True), "\n"]
    distances = divergences(loaded.runs)
    for model, mode in dict.fromkeys((row.method.model, row.mode) for row in distances):
        here_ = [row for row in distances if (row.method.model, row.mode) == (model, mode)]
        parts += [f"## {model}: distance from full precision, {mode}\n\n", _kld_rows(here_), "\n"]
    parts += [f"![{Path(name).stem}]({name})\n\n" for name in plots]
    parts.append(_notes(loaded))
    return "".join(parts)


def _notes(loaded: Loaded) -> str:
    """How to read it, and where it comes from."""
    lines = [
        "B/token: real bytes of the KV budget, whole pages and tables included; *vs bf16* is the "
        "ratio by them, *nominal* the one by bits of codes alone. Difference: compressed minus full "
        "precision on the same samples; with one seed a paired bootstrap over samples, with several "
        "Student's interval over their means. In a mean over tasks it is the mean of the tasks' "
        "intervals, which is too wide rather than too narrow.\n\n"
    ]
    sources = dict.fromkeys(
        (run.provenance.command, run.provenance.commit, run.provenance.device)
        for run in loaded.runs
    )
    for command, commit, device in sources:
        lines.append(f"* `{command}` (commit {commit or 'unknown'}; {device})\n")
    return "".join(lines)


def write_csv(loaded: Loaded, folder: Path) -> list[str]:
    """Write tasks.csv and kld.csv, those that have rows; return their names."""
    written = []
    for name, rows in (("tasks.csv", scores(loaded.runs)), ("kld.csv", divergences(loaded.runs))):
        if rows:
            flat = [_flat(row) for row in rows]
            with (folder / name).open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(flat[0]))
                writer.writeheader()
                writer.writerows(flat)
            written.append(name)
    return written


def _flat(row: Score | Divergence) -> dict[str, Any]:
    """One line, without nesting."""
    values: dict[str, Any] = {}
    for name, value in vars(row).items():
        if isinstance(value, Method):
            values |= vars(value)
        elif name == "ci95":
            values |= {"ci95_low": value[0], "ci95_high": value[1]}
        else:
            values[name] = value
    return values
