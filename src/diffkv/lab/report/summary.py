"""Joins runs that differ only in their seed: means, and how sure they are."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from scipy.stats import t

from diffkv.lab.evaluation.results import Method, TaskScore
from diffkv.lab.rows import Row

__all__ = ["Place", "Summary", "by_place", "overall", "summaries"]

Place = tuple[str, str, str, str]
"""(model, suite, setting, what was asked): results that can be compared with each other."""

ASKED = ("language", "tokens", "samples", "dtype", "thinking", "harness")
"""Sizes and kinds of what was asked, by their names in a case."""


@dataclass(frozen=True)
class Summary:
    """A method at a task.

    Attributes:
        method: which.
        suite: the runs'.
        asked: what was asked, in words.
        seeds: how many runs.
        score: means of their figures; `n` adds up. Of one seed the interval is its own bootstrap, of
            several Student's over their means.
    """

    method: Method
    suite: str
    asked: str
    seeds: int
    score: TaskScore

    @property
    def place(self) -> Place:
        """Where it can be compared."""
        return self.method.model, self.suite, self.score.setting, self.asked


def _students(differences: Sequence[float]) -> tuple[float, float]:
    """Student's interval of a mean of several seeds."""
    n = len(differences)
    half = t.ppf(0.975, n - 1) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    mean = float(np.mean(differences))
    return float(mean - half), float(mean + half)


def _mean(found: Sequence[TaskScore]) -> TaskScore:
    """Means of all shares and figures, the ends of intervals too; counts add up."""
    means: dict[str, Any] = {}
    for field in fields(found[0]):
        values = [getattr(score, field.name) for score in found]
        if isinstance(values[0], float):
            means[field.name] = float(np.mean(values))
        elif isinstance(values[0], int):
            means[field.name] = sum(values)
    return replace(found[0], **means)


def _over_seeds(found: Sequence[TaskScore]) -> TaskScore:
    """One score of those of several seeds."""
    mean = _mean(found)
    if len(found) == 1:
        return mean
    low, high = _students([score.difference for score in found])
    return replace(mean, ci95_low=low, ci95_high=high)


def summaries(results: Iterable[tuple[Row, Sequence[TaskScore]]]) -> list[Summary]:
    """Join scores of runs that differ in their seed alone."""
    groups: dict[tuple[Method, str, str, str, str], list[TaskScore]] = {}
    for row, found in results:
        for score in found:
            key = (Method.of(row), row["suite"], _asked(row), score.task, score.setting)
            groups.setdefault(key, []).append(score)
    joined = []
    for (method, suite, asked, *_), same in groups.items():
        joined.append(Summary(method, suite, asked, len(same), _over_seeds(same)))
    return joined


def _asked(row: Row) -> str:
    """What a row was asked, as in `language english, tokens 1024`; what is off is left out."""
    given = {name: row.case.get(name) for name in ASKED}
    return ", ".join(f"{name} {value}" for name, value in given.items() if value)


def by_place(found: Iterable[Summary]) -> dict[Place, list[Summary]]:
    """Summaries that can be compared with each other."""
    places: dict[Place, list[Summary]] = {}
    for summary in found:
        places.setdefault(summary.place, []).append(summary)
    return places


def overall(
    found: Iterable[Summary],
    pick: Callable[[Sequence[TaskScore]], TaskScore] = _mean,
) -> list[Summary]:
    """One summary for each method and place, over the tasks that all methods there have.

    Args:
        found: scores of every task.
        pick: makes one score of several; the mean has the mean of the tasks' intervals, which is wider
            than the interval of the mean.
    """
    joined = []
    for group in by_place(found).values():
        methods = list(dict.fromkeys(summary.method for summary in group))
        common = set.intersection(
            *({s.score.task for s in group if s.method == method} for method in methods)
        )
        for method in methods:
            mine = [s for s in group if s.method == method and s.score.task in common]
            if mine:
                score = pick([summary.score for summary in mine])
                seeds = min(summary.seeds for summary in mine)
                joined.append(Summary(method, mine[0].suite, mine[0].asked, seeds, score))
    return joined
