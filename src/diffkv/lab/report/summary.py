"""Joins runs that differ only in their seed: means, and how sure they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t

from diffkv.lab.evaluation.results import KldRow, Run, TaskRow
from diffkv.quant import ConfigError

__all__ = ["Divergence", "Method", "Score", "divergences", "methods_of", "overall", "scores"]


@dataclass(frozen=True, order=True)
class Method:
    """What was compared: everything about a run but its samples."""

    model: str
    engine: str
    policy: str
    quant: str
    alpha_high: float
    alpha_low: float
    window: int
    rotate: str

    @classmethod
    def of(cls, run: Run) -> "Method":
        """The method of a run."""
        return cls(
            run.model, run.engine, run.policy, run.quant, run.alpha_high, run.alpha_low, run.window,
            run.rotate,
        )  # fmt: skip

    def label(self) -> str:
        """In few words; thresholds only where the policy has them."""
        uses = self.alpha_high > 0 or self.alpha_low > 0
        alphas = f" alpha {self.alpha_high:g}/{self.alpha_low:g}" if uses else ""
        rotated = "" if self.rotate == "none" else f" {self.rotate}"
        return f"{self.policy} {self.quant}{alphas}{rotated}"


@dataclass(frozen=True)
class Score:
    """A method at a task, over all seeds.

    Attributes:
        method: which.
        suite: of the runs.
        task: name, and setting.
        setting: of the task.
        seeds: how many runs.
        n: samples of all of them.
        accuracy: mean.
        accuracy_full: mean in full precision.
        difference: the first minus the second.
        ci95: of the difference: of one seed its bootstrap; of several, Student's over their means.
        bytes_per_token: mean, real bytes.
        ratio_bf16: mean.
        nominal_ratio_bf16: mean.
        high: mean share of tokens.
        low: likewise.
        dropped: likewise.
    """

    method: Method
    suite: str
    task: str
    setting: str
    seeds: int
    n: int
    accuracy: float
    accuracy_full: float
    difference: float
    ci95: tuple[float, float]
    bytes_per_token: float
    ratio_bf16: float
    nominal_ratio_bf16: float
    high: float
    low: float
    dropped: float


@dataclass(frozen=True)
class Divergence:
    """A method's distance from full precision, over all seeds; fields as `KldRow` has them."""

    method: Method
    mode: str
    seeds: int
    n: int
    kld_mean: float
    kld_median: float
    kld_p999: float
    same_top1: float
    first_divergence: float
    bytes_per_token: float
    ratio_bf16: float


def _interval(differences: Sequence[float]) -> tuple[float, float]:
    """Student's interval of a mean of several seeds."""
    n = len(differences)
    half = t.ppf(0.975, n - 1) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    mean = float(np.mean(differences))
    return float(mean - half), float(mean + half)


def _groups(runs: Sequence[Run], attribute: str) -> dict[Any, dict[int, Any]]:
    """Rows by (method, suite, what was asked), and by seed.

    Raises:
        ConfigError: two different rows of the same seed.
    """
    groups: dict[Any, dict[int, Any]] = {}
    for run in runs:
        for row in getattr(run, attribute):
            asked = (row.task, row.setting) if isinstance(row, TaskRow) else (row.mode,)
            by_seed = groups.setdefault((Method.of(run), run.suite, *asked), {})
            if run.seed in by_seed:
                raise ConfigError(
                    f"two results of {Method.of(run).label()} at {' '.join(asked)} have seed "
                    f"{run.seed}: give runs that are to be averaged different seeds"
                )
            by_seed[run.seed] = row
    return groups


def _means(rows: Sequence[Any], names: Sequence[str]) -> dict[str, float]:
    return {name: float(np.mean([getattr(row, name) for row in rows])) for name in names}


COSTS = ("bytes_per_token", "ratio_bf16")


def scores(runs: Sequence[Run]) -> list[Score]:
    """The tasks of all runs, joined over seeds.

    Raises:
        ConfigError: two different results for one method, task and seed.
    """
    names = ("accuracy", "accuracy_full", *COSTS, "nominal_ratio_bf16", "high", "low", "dropped")
    found = []
    for (method, suite, task, setting), by_seed in _groups(runs, "tasks").items():
        rows: list[TaskRow] = list(by_seed.values())
        differences = [row.accuracy - row.accuracy_full for row in rows]
        ci95 = rows[0].ci95_difference if len(rows) == 1 else _interval(differences)
        found.append(
            Score(
                method=method, suite=suite, task=task, setting=setting, seeds=len(rows),
                n=sum(row.n for row in rows), difference=float(np.mean(differences)), ci95=ci95,
                **_means(rows, names),
            )
        )  # fmt: skip
    return found


def divergences(runs: Sequence[Run]) -> list[Divergence]:
    """The distances of all runs, joined over seeds.

    Raises:
        ConfigError: two different results for one method, mode and seed.
    """
    names = ("kld_mean", "kld_median", "kld_p999", "same_top1", "first_divergence", *COSTS)
    found = []
    for (method, _, mode), by_seed in _groups(runs, "kld").items():
        rows: list[KldRow] = list(by_seed.values())
        n = sum(row.n for row in rows)
        found.append(Divergence(method, mode, len(rows), n, **_means(rows, names)))
    return found


def methods_of(rows: Sequence[Score] | Sequence[Divergence]) -> list[Method]:
    """The methods, in the order of the files."""
    return list(dict.fromkeys(row.method for row in rows))


def overall(rows: Sequence[Score]) -> list[Score]:
    """One row for each method and setting: the mean over its tasks, of those that all methods have.

    The interval is the mean of the tasks' intervals, which is wider than that of the mean.
    """
    by_place: dict[tuple[str, str, str], list[Score]] = {}
    for row in rows:
        by_place.setdefault((row.method.model, row.suite, row.setting), []).append(row)
    found = []
    for (_, suite, setting), group in by_place.items():
        methods = methods_of(group)
        tasks = [{row.task for row in group if row.method == method} for method in methods]
        common = set.intersection(*tasks)
        for method in methods:
            mine = [row for row in group if row.method == method and row.task in common]
            if not mine:
                continue
            names = ("accuracy", "accuracy_full", "difference", *COSTS, "nominal_ratio_bf16",
                     "high", "low", "dropped")  # fmt: skip
            low, high = (float(np.mean([row.ci95[end] for row in mine])) for end in (0, 1))
            found.append(
                Score(
                    method=method, suite=suite, task=f"mean of {len(mine)}", setting=setting,
                    seeds=min(row.seeds for row in mine), n=sum(row.n for row in mine),
                    ci95=(low, high), **_means(mine, names),
                )
            )  # fmt: skip
    return found
