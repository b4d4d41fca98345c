"""Writes a page of results in Markdown: commands, where the figures come from, tables, plots."""

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from diffkv.lab.rows import Row

__all__ = ["NOTHING", "Column", "Page", "file_name", "number", "percent", "times", "write_csv"]

T = TypeVar("T")
Column = tuple[str, Callable[[T], str]]
"""Heading of a column, and the text of its cell for an item."""

NOTHING = "—"


def number(value: float | None, digits: int = 1) -> str:
    """A figure with thousands separated, or a dash."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as percent, or a dash."""
    return NOTHING if share is None else f"{share:.{digits}%}"


def times(ratio: float | None) -> str:
    """A ratio, or a dash."""
    return NOTHING if ratio is None else f"{ratio:.2f}x"


def file_name(*words: str) -> str:
    """A name of a plot that any file system takes."""
    kept = re.sub(r"[^\w.]+", "-", "-".join(words).lower()).strip("-.")
    return f"{kept}.png"


class Page:
    """A page that grows from top to bottom.

    Args:
        title: first heading.
    """

    def __init__(self, title: str) -> None:
        self._parts = [f"# {title}"]

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"## {text}")

    def text(self, text: str) -> None:
        """A paragraph, as it stands."""
        self._parts.append(text)

    def sources(self, rows: Iterable[Row]) -> None:
        """The commands of some rows, and the machines and versions that ran them, each once."""
        origins = [row.provenance for row in rows]
        commands = dict.fromkeys(origin.command for origin in origins)
        places = dict.fromkeys(f"{origin.machine}; {origin.software}." for origin in origins)
        self._parts.append("```\n" + "\n".join(commands) + "\n```")
        self._parts.append("\n".join(places))

    def table(self, columns: Sequence[Column[T]], items: Iterable[T]) -> None:
        """A line for each item; the first column is text, the others are figures.

        A column in which there is nothing but dashes is left out.
        """
        items = list(items)
        drawn = [
            [name, rule, *cells]
            for (name, cell), rule in zip(columns, ["---", *["---:"] * len(columns)], strict=False)
            if set(cells := [cell(item).replace("|", "\\|") for item in items]) != {NOTHING}
        ]
        lines = [f"| {' | '.join(cells)} |" for cells in zip(*drawn, strict=True)]
        self._parts.append("\n".join(lines))

    def failures(self, rows: Iterable[Row], name: Callable[[Row], str]) -> None:
        """A line for each row that did not run, with its reason."""
        lines = [f"* {name(row)}: {row.error}" for row in rows if row.error is not None]
        if lines:
            self._parts.append("Did not run:\n\n" + "\n".join(lines))

    def plot(self, name: str, text: str) -> None:
        """A picture beside the page, and what it shows."""
        self._parts.append(f"![{text}]({name})")

    def write(self, path: Path) -> None:
        """Write what there is so far."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(self._parts) + "\n", encoding="utf-8")


def write_csv(path: Path, items: Sequence[dict[str, object]]) -> None:
    """Write items for other programs; the first one's names are the columns."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(items[0]))
        writer.writeheader()
        writer.writerows(items)
