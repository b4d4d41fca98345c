"""The search: first alpha_high with nothing dropped, then alpha_low beside it.

That order is the published one (DiffKV, SOSP 2025, section 4), where a person read both curves. Here
each is bisected over the published grid: loss grows with a threshold, but for the noise of the samples.
A setting is measured on growing parts of the samples and given up as soon as it is surely too bad; only
one that was measured on all of them can be taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from diffkv.evaluation.intervals import interval
from diffkv.policy import Thresholds

__all__ = ["HIGH_GRID", "LOW_GRID", "Cost", "Measure", "Part", "Point", "search", "stages"]

HIGH_GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
"""Every alpha_high of the release's calibration scripts from 0 to 5."""

LOW_GRID = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2)
"""Every alpha_low of them."""

FIRST_SHARE = 8
"""A setting is first tried on one sample in so many."""


@dataclass(frozen=True)
class Cost:
    """What some samples spent, and would in a bf16 cache; token counts are means over heads."""

    tokens: int
    high: float
    low: float
    num_bytes: float
    bf16_bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.tokens + other.tokens,
            self.high + other.high,
            self.low + other.low,
            self.num_bytes + other.num_bytes,
            self.bf16_bytes + other.bf16_bytes,
        )


@dataclass(frozen=True)
class Part:
    """One setting on some samples.

    Attributes:
        losses: of each sample, against full precision.
        cost: of all of them.
    """

    losses: tuple[float, ...]
    cost: Cost


class Measure(Protocol):
    """Runs samples with thresholds. Samples are numbered, and always the same."""

    def __call__(self, thresholds: Thresholds, samples: range) -> Part:
        """What the samples lose and cost."""


@dataclass(frozen=True)
class Point:
    """One setting of the curve.

    Attributes:
        thresholds: the setting.
        n: samples it was measured on; fewer than all if it was given up.
        loss: mean of the samples.
        ci95: interval of the loss.
        cost: of the samples.
        accepted: whether all samples were measured and their loss is within the limit.
    """

    thresholds: Thresholds
    n: int
    loss: float
    ci95: tuple[float, float]
    cost: Cost
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
    measured: Callable[[Point], None] = lambda point: None,
) -> tuple[Point | None, list[Point]]:
    """Find the largest thresholds whose loss is within a limit.

    Args:
        measure: runs samples.
        num_samples: how many there are.
        max_loss: the limit.
        has_low: whether there is a low tier; without one alpha_low is the only threshold.
        measured: is told of each point.

    Returns:
        The choice, None if even the mildest setting loses too much; and every point measured.
    """
    points: dict[Thresholds, Point] = {}

    def accepts(thresholds: Thresholds) -> bool:
        if thresholds not in points:
            points[thresholds] = _measure(measure, thresholds, num_samples, max_loss)
            measured(points[thresholds])
        return points[thresholds].accepted

    choice = None
    highs = [Thresholds(alpha, 0.0) for alpha in (HIGH_GRID if has_low else HIGH_GRID[:1])]
    if accepts(highs[0]):
        choice = highs[_last_accepted(highs, accepts)]
        lows = [
            Thresholds(choice.alpha_high if has_low else alpha, alpha)
            for alpha in LOW_GRID
            if alpha <= choice.alpha_high or not has_low
        ]
        choice = lows[_last_accepted(lows, accepts)]
    return (None if choice is None else points[choice]), list(points.values())


def _last_accepted(grid: Sequence[Thresholds], accepts: Callable[[Thresholds], bool]) -> int:
    """Bisect; the first setting of the grid is accepted already."""
    accepted, refused = 0, len(grid)
    while refused - accepted > 1:
        middle = (accepted + refused) // 2
        if accepts(grid[middle]):
            accepted = middle
        else:
            refused = middle
    return accepted


def _measure(measure: Measure, thresholds: Thresholds, num_samples: int, max_loss: float) -> Point:
    losses: list[float] = []
    cost = Cost(0, 0.0, 0.0, 0.0, 0.0)
    for samples in stages(num_samples):
        part = measure(thresholds, samples)
        losses += part.losses
        cost += part.cost
        ci95 = interval(losses)
        if ci95[0] > max_loss:
            break
    loss, n = sum(losses) / len(losses), len(losses)
    return Point(thresholds, n, loss, ci95, cost, n == num_samples and loss <= max_loss)
