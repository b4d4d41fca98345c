"""Reads result files: rows of `diffkv eval`, of `diffkv inspect --json` and of `diffkv bench`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffkv.lab import rows
from diffkv.lab.bench.pages import KINDS as BENCH_KINDS
from diffkv.lab.evaluation.results import (
    DISTANCES,
    HEADS,
    TASKS,
    DistanceScore,
    Method,
    TaskScore,
    scores,
)
from diffkv.lab.rows import Row
from diffkv.quant import ConfigError

__all__ = ["Loaded", "Measured", "read"]

Measured = tuple[Row, list[DistanceScore]]
"""A cache, and its distances from full precision in each cell."""


DISTANCES_OF = ("model", "engine", "dtype", "cache", "sha256", "max_steps")
"""What the case of a row of distances must say."""


@dataclass(frozen=True)
class Loaded:
    """Everything that the files hold, in their order.

    Attributes:
        tasks: rows with a score for each task.
        distances: rows with a score for each length of texts.
        failed: such rows of caches that could not be run.
        heads: rows of what each layer and head kept.
        bench: rows of `diffkv bench`.
    """

    tasks: list[tuple[Row, list[TaskScore]]]
    distances: list[Measured]
    failed: list[Row]
    heads: list[Row]
    bench: list[Row]

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for row, _ in (*self.tasks, *self.distances)] + self.heads + self.bench


def read(paths: Sequence[Path]) -> Loaded:
    """Read files of rows.

    Raises:
        ConfigError: a file that cannot be read or holds something else; two results of one case.
    """
    loaded = Loaded([], [], [], [], [])
    cases: list[tuple[str, dict[str, object]]] = []
    for path in paths:
        for row in rows.read(path):
            if row.kind in BENCH_KINDS:
                loaded.bench.append(row)
                continue
            if row.error is not None and row.kind == DISTANCES:
                loaded.failed.append(row)
                continue
            if row.error is not None:
                raise ConfigError(f"{path} holds a run that failed: {row.error}")
            try:
                name = _add(loaded, row)
            except ValueError as error:
                raise ConfigError(
                    f"{path} holds no result of diffkv eval or diffkv inspect: {error}"
                ) from None
            if (row.kind, row.case) in cases:
                raise ConfigError(f"{path} holds {name} once more: name each result once")
            cases.append((row.kind, row.case))
    known = [row.case for row, _ in loaded.distances]
    loaded.failed[:] = [row for row in loaded.failed if row.case not in known]
    if not loaded.rows:
        raise ConfigError(f"{', '.join(map(str, paths))}: no results")
    return loaded


def _add(loaded: Loaded, row: Row) -> str:
    """Put a row where it belongs; its name in an error."""
    if row.kind == HEADS:
        if "shares" not in row.measured or "quant" not in row.case:
            raise ValueError("a row of heads needs shares and quant")
        loaded.heads.append(row)
        return f"heads of {row.case.get('model')}"
    if row.kind == DISTANCES:
        if missing := [name for name in DISTANCES_OF if name not in row.case]:
            raise ValueError(f"case lacks {', '.join(missing)}")
        loaded.distances.append((row, scores(row)))
        return f"the distances of {row['cache']}"
    if row.kind != TASKS:
        raise ValueError(f"a row of kind {row.kind}")
    name = f"{Method.of(row).label()} with seed {row.get('seed', 0)}"
    loaded.tasks.append((row, scores(row)))
    return name
