"""The search: first alpha_high with nothing dropped, then what may be dropped beside it.

alpha_high before alpha_low is the published order (DiffKV, SOSP 2025, section 4), where a person read
both curves. Here each is bisected over the published grid: loss grows with a threshold, but for the
noise of the samples. The share of distinct keys comes last, for it drops of the low tokens that the
thresholds leave.

A setting is measured on growing parts of the samples and given up as soon as it is surely too bad; only
one that was measured on all of them can be taken.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from diffkv.lab.evaluation.intervals import interval
from diffkv.policies import PAPER, with_distinct
from diffkv.policy import Thresholds
from diffkv.quant import QuantConfig
from diffkv.use import CacheUse

__all__ = [
    "ALPHA_HIGH",
    "ALPHA_LOW",
    "DISTINCT",
    "DISTINCT_GRID",
    "HIGH_GRID",
    "LOW_GRID",
    "PUBLISHED",
    "STEPS",
    "Measure",
    "Part",
    "Point",
    "Setting",
    "climb",
    "search",
    "stages",
]

ALPHA_HIGH, ALPHA_LOW, DISTINCT = STEPS = ("alpha_high", "alpha_low", "distinct")
"""What can be searched, in the order in which it is."""

PUBLISHED = STEPS[:2]

HIGH_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)
"""Values of alpha_high: those of the release's calibration scripts from 0 to 5, coarser, and beyond."""

LOW_GRID = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2)
"""Every alpha_low of the release's calibration scripts."""

DISTINCT_GRID = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3)
"""Shares of a prompt that stay, those of the most unusual keys."""

FIRST_SHARE = 8
"""A setting is first tried on one sample in so many."""


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        thresholds: the requests'.
        distinct: share of a prompt that stays, see `diffkv.policies`.
    """

    thresholds: Thresholds
    distinct: float = 1.0

    def __str__(self) -> str:
        """In words; the share only where something is dropped by it."""
        alphas = self.thresholds
        share = f", distinct {self.distinct:g}" if self.distinct < 1 else ""
        return f"alpha_high {alphas.alpha_high:g}, alpha_low {alphas.alpha_low:g}{share}"

    def values(self, quant: QuantConfig) -> dict[str, Any]:
        """What an engine of some formats is started with, by the names of its options."""
        values = {
            "quant": str(quant),
            "alpha_low": self.thresholds.alpha_low,
            "policy": with_distinct(PAPER.text, self.distinct),
        }
        return {**values, "alpha_high": self.thresholds.alpha_high} if quant.has_low else values


@dataclass(frozen=True)
class Part:
    """One setting on some samples.

    Attributes:
        losses: each sample's, against full precision.
        use: what all of them held.
    """

    losses: tuple[float, ...]
    use: CacheUse


class Measure(Protocol):
    """Runs samples with a setting. Samples are numbered, and always the same."""

    def __call__(self, setting: Setting, samples: range) -> Part:
        """What the samples lose and cost."""


@dataclass(frozen=True)
class Point:
    """One setting of the curve.

    Attributes:
        setting: which.
        n: samples it was measured on; fewer than all if it was given up.
        loss: mean of the samples.
        ci95: interval of the loss.
        use: what the samples held.
        accepted: whether all samples were measured and their loss is within the limit.
    """

    setting: Setting
    n: int
    loss: float
    ci95: tuple[float, float]
    use: CacheUse
    accepted: bool


def stages(num_samples: int) -> list[range]:
    """Parts that samples are measured in: each doubles what was measured before."""
    size = max(1, num_samples // FIRST_SHARE)
    parts, start = [], 0
    while start < num_samples:
        stop = num_samples if 2 * size > num_samples else size
        parts.append(range(start, stop))
        start, size = stop, 2 * stop
    return parts


def search(
    measure: Measure,
    num_samples: int,
    max_loss: float,
    has_low: bool,
    steps: Collection[str] = PUBLISHED,
    measured: Callable[[Point], None] = lambda point: None,
) -> tuple[Point | None, list[Point]]:
    """Find the setting that compresses most of those whose loss is within a limit.

    Args:
        measure: runs samples.
        num_samples: how many there are.
        max_loss: the limit.
        has_low: whether there is a low tier; without one alpha_low is the only threshold.
        steps: those of `STEPS` that are searched; the others stay at their mildest value.
        measured: is told of each point.

    Returns:
        The choice, None if even the mildest setting loses too much; and every point measured.
    """
    points: dict[Setting, Point] = {}

    def accepts(setting: Setting) -> bool:
        if setting not in points:
            points[setting] = _measure(measure, setting, num_samples, max_loss)
            measured(points[setting])
        return points[setting].accepted

    choice = climb(accepts, has_low, steps)
    return None if choice is None else points[choice], list(points.values())


def climb(
    accepts: Callable[[Setting], bool],
    has_low: bool,
    steps: Collection[str],
) -> Setting | None:
    """Take one step after the other, each as far as settings are accepted.

    Args:
        accepts: whether a setting is; may be asked again about the same one.
        has_low: whether there is a low tier; without one alpha_low is the only threshold.
        steps: those of `STEPS` that are taken; the others stay at their mildest value.

    Returns:
        The last setting that is accepted; None if even the mildest is not.
    """
    choice = Setting(Thresholds())
    if not accepts(choice):
        return None
    for step in STEPS:
        if step in steps:
            grid = _grid(step, choice, has_low)
            choice = grid[_last_accepted(grid, accepts)]
    return choice


def _grid(step: str, choice: Setting, has_low: bool) -> list[Setting]:
    """Settings of a step, the mildest first, which is what was chosen before."""
    high = choice.thresholds.alpha_high
    if step == ALPHA_HIGH:
        return [Setting(Thresholds(alpha, 0.0)) for alpha in (HIGH_GRID if has_low else (0.0,))]
    if step == ALPHA_LOW:
        if not has_low:
            return [Setting(Thresholds(alpha, alpha)) for alpha in LOW_GRID]
        return [Setting(Thresholds(high, alpha)) for alpha in LOW_GRID if alpha <= high]
    # Only low tokens are dropped by their keys: without any, every share is the same.
    return [replace(choice, distinct=s) for s in (DISTINCT_GRID if high and has_low else (1.0,))]


def _last_accepted(grid: Sequence[Setting], accepts: Callable[[Setting], bool]) -> int:
    """Bisect; the first setting of the grid is accepted already."""
    accepted, refused = 0, len(grid)
    while refused - accepted > 1:
        middle = (accepted + refused) // 2
        if accepts(grid[middle]):
            accepted = middle
        else:
            refused = middle
    return accepted


def _measure(measure: Measure, setting: Setting, num_samples: int, max_loss: float) -> Point:
    losses: list[float] = []
    use = CacheUse()
    for samples in stages(num_samples):
        part = measure(setting, samples)
        losses += part.losses
        use += part.use
        ci95 = interval(losses)
        if ci95[0] > max_loss:
            break
    loss, n = sum(losses) / len(losses), len(losses)
    return Point(setting, n, loss, ci95, use, n == num_samples and loss <= max_loss)
