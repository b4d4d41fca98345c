"""How far a command is that measures one thing after the other, and what an earlier run of it found."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diffkv.lab.calibrate.journal import PARTIAL, Journal

__all__ = ["going_on", "progress"]


def progress() -> Progress:
    """A bar on standard error that goes away when all is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )


def going_on(out: Path, identity: dict[str, Any]) -> Journal:
    """The journal beside an output; says so if there is something in it.

    Args:
        out: the file that will be written.
        identity: everything that the findings depend on.

    Raises:
        ConfigError: the journal is of another run, or cannot be kept.
    """
    journal = Journal(out.with_name(out.name + PARTIAL), identity)
    if journal.num_found:
        print(f"diffkv: going on from {out}{PARTIAL}", file=sys.stderr)
    return journal
