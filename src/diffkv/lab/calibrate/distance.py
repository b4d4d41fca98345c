"""The search by texts: the fewest real bytes whose distance from full precision is within limits.

No question is asked and nothing is generated: every setting reads the same texts, and its next-token
distributions are compared with those of full precision (`diffkv.lab.evaluation.kld`). What is searched,
and in which order, is as in `search`; several pairs of formats are searched one after the other.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from diffkv.lab.calibrate.journal import Journal
from diffkv.lab.calibrate.search import Setting, climb
from diffkv.lab.evaluation.engine import CacheSpec, NamedCache
from diffkv.lab.evaluation.results import DistanceScore
from diffkv.quant import QuantConfig
from diffkv.vllm_plugin.options import Options

__all__ = ["Limits", "Measure", "Tried", "choose", "nearest", "reader", "search"]

Measure = Callable[[QuantConfig, Setting], DistanceScore]
"""Reads all texts with a setting."""


@dataclass(frozen=True)
class Limits:
    """What a choice may lose, over all compared steps.

    Attributes:
        mean: of KL(full || cache), in nats.
        p99: of its 99 % quantile.
    """

    mean: float
    p99: float = math.inf

    def used(self, score: DistanceScore) -> float:
        """Share of the limits that a cache uses up, of the tighter one; within them up to 1."""
        return max(score.kld_mean / self.mean, score.kld_p99 / self.p99)


@dataclass(frozen=True)
class Tried:
    """A setting that was measured.

    Attributes:
        quant: its formats.
        setting: thresholds and drops.
        score: over all texts.
        used: share of the limits, see `Limits.used`.
    """

    quant: QuantConfig
    setting: Setting
    score: DistanceScore
    used: float

    def __str__(self) -> str:
        """In words."""
        return f"{self.quant}, {self.setting}"

    @property
    def accepted(self) -> bool:
        """Whether it is within the limits."""
        return self.used <= 1


def search(
    measure: Measure,
    quants: Sequence[QuantConfig],
    limits: Limits,
    steps: Collection[str],
    measured: Callable[[Tried], None] = lambda tried: None,
) -> list[Tried]:
    """Bisect each pair of formats.

    Args:
        measure: reads the texts.
        quants: formats to search.
        limits: what a choice may lose.
        steps: those of `search.STEPS` that are searched; the others stay where nothing is dropped.
        measured: is told of each setting.

    Returns:
        Everything that was measured, in its order.
    """
    found: dict[tuple[QuantConfig, Setting], Tried] = {}

    def accepts(quant: QuantConfig, setting: Setting) -> bool:
        if (quant, setting) not in found:
            score = measure(quant, setting)
            found[quant, setting] = Tried(quant, setting, score, limits.used(score))
            measured(found[quant, setting])
        return found[quant, setting].accepted

    for quant in quants:
        climb(partial(accepts, quant), quant.has_low, steps)
    return list(found.values())


def choose(tried: Sequence[Tried]) -> Tried | None:
    """The one of fewest real bytes within the limits, if there is one; of equals the nearest."""
    accepted = [each for each in tried if each.accepted]
    return min(accepted, key=lambda each: (each.score.bytes_per_token, each.used), default=None)


def nearest(tried: Sequence[Tried]) -> Tried:
    """The one that comes nearest to the limits."""
    return min(tried, key=lambda each: each.used)


def reader(
    compare: Callable[[NamedCache], Sequence[DistanceScore]], window: int, journal: Journal
) -> Measure:
    """A measure that looks into a journal first.

    Args:
        compare: as `diffkv.lab.evaluation.kld.Comparison`, whose first score is that of all texts.
        window: recent tokens that stay high.
        journal: keeps what was found.
    """

    def read(quant: QuantConfig, setting: Setting) -> DistanceScore:
        name = f"{quant}, {setting}"
        options = Options.parse({**setting.values(quant), "window": window})
        cache = NamedCache(name, CacheSpec.of(options))
        return DistanceScore(**journal.get(name, lambda: asdict(compare(cache)[0])))

    return read
