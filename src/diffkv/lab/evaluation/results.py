"""What rows of an evaluation hold: a method, what it was asked, and figures of every task or context.

A row of kind `TASKS` is one method with one seed. Its case has the names of `Method`, and the cells that
were asked: `tasks` and `settings`. A figure is measured as a list with a value for each cell, in that
order, or as one value that all of them have.

A row of kind `DISTANCES` is one cache of an engine, ours or another's: its case has the cache's name
(`cache`) and, if it is ours, its settings (`quant` among them); its cells are `contexts`.
"""

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import product
from typing import Any

from diffkv.lab.rows import Row
from diffkv.policy import WINDOW

__all__ = [
    "ALL_TEXTS",
    "DISTANCES",
    "HEADS",
    "TASKS",
    "DistanceScore",
    "Method",
    "Score",
    "TaskScore",
    "figures",
    "scores",
]

TASKS, DISTANCES, HEADS = "tasks", "distances", "heads"
"""Kinds of rows: of `diffkv eval`, of its suite kld, of `diffkv inspect`."""

ALL_TEXTS = "all"
"""The cell of `DISTANCES` that has texts of every length."""

DIGITS = 6
SHARES = ("accuracy", "accuracy_full", "exact", "exact_full", "same_top1", "high", "low", "dropped")


@dataclass(frozen=True, order=True)
class Method:
    """What is compared: everything about a run but its samples.

    Attributes:
        model: as it was named.
        engine: hf or vllm.
        quant: text form of the formats.
        policy: text form of the policy.
        alpha_high: threshold.
        alpha_low: threshold.
        window: recent tokens that stay high.
        rotate: what keys and values are rotated by before they are quantised, or none.
        segment: tokens after which a prompt is decided; 0, also where a row does not say: prompts are
            decided whole.
        more: whatever else is not as usual, in words.
    """

    model: str
    engine: str
    quant: str
    policy: str
    alpha_high: float
    alpha_low: float
    window: int
    rotate: str
    segment: int = 0
    more: str = ""

    @classmethod
    def of(cls, row: Row) -> "Method":
        """The method of a row.

        Raises:
            ValueError: the row does not name all of it.
        """
        given = {field.name: row.case.get(field.name, field.default) for field in fields(cls)}
        if missing := [name for name, value in given.items() if value is MISSING]:
            raise ValueError(f"case lacks {', '.join(missing)}")
        return cls(**given)

    @staticmethod
    def words(page_bytes: int | None, kernels: str | None, drops: bool | None) -> str:
        """`more` of a cache: what is not as usual, by the names of its options."""
        given = {"page_bytes": page_bytes, "kernels": kernels, "drops": drops}
        return " ".join(f"{name}={value}" for name, value in given.items() if value)

    def case(self) -> dict[str, Any]:
        """The method as rows name it."""
        return {name: value for name, value in asdict(self).items() if name != "more" or value}

    def label(self) -> str:
        """The method in few words; thresholds only where the policy has them."""
        uses = self.alpha_high > 0 or self.alpha_low > 0
        alphas = f" alpha {self.alpha_high:g}/{self.alpha_low:g}" if uses else ""
        rotated = "" if self.rotate == "none" else f" {self.rotate}"
        window = "" if self.window == WINDOW else f" window {self.window}"
        segment = f" segment {self.segment}" if self.segment else ""
        more = f" {self.more}" if self.more else ""
        return f"{self.policy} {self.quant}{alphas}{rotated}{window}{segment}{more}"


@dataclass(frozen=True)
class Score:
    """What the cache spent on a cell, when the requests end; means over requests, layers and heads.

    Attributes:
        n: samples, or texts.
        bytes_per_token: whole pages, half-empty ones included, and the page-table entries of all heads
            and layers, over tokens of the request.
        ratio_bf16: bytes of a bf16 cache over `bytes_per_token`.
        nominal_ratio_bf16: the same by bits of kept codes alone; never to be shown without the other.
        high: share of a request's tokens in the high tier.
        low: share of them in the low tier.
        dropped: share of them that is gone.
    """

    n: int
    bytes_per_token: float
    ratio_bf16: float
    nominal_ratio_bf16: float
    high: float
    low: float
    dropped: float

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        for name in SHARES:
            if not 0 <= getattr(self, name, 0) <= 1:
                raise ValueError(f"{name} must be in 0 .. 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class TaskScore(Score):
    """One task in one setting.

    Attributes:
        task: its name.
        setting: easy: the question ends the prompt. hard: it comes when the prompt is compressed.
            benchmark: the prompt of a task of lm-evaluation-harness.
        accuracy: mean share of right answer words of a sample.
        accuracy_full: the same of the same samples through the full-precision cache.
        exact: share of samples whose scored words are all right.
        exact_full: the same in full precision.
        ci95_low: lower end of the 95 % interval of `difference`, paired, bootstrapped over samples.
        ci95_high: its upper end.
    """

    task: str
    setting: str
    accuracy: float
    accuracy_full: float
    exact: float
    exact_full: float
    ci95_low: float
    ci95_high: float

    @property
    def difference(self) -> float:
        """Accuracy that the compressed cache gains; below 0 where it loses."""
        return self.accuracy - self.accuracy_full


@dataclass(frozen=True)
class DistanceScore(Score):
    """Distance of a cache from full precision, over all texts or those of one length.

    Attributes:
        context: tokens of the texts, or `ALL_TEXTS`.
        steps: compared steps of all texts, on the texts' own tokens.
        kld_mean: mean of KL(full || cache) over those steps, in nats.
        kld_median: its median.
        kld_p99: its 99 % quantile.
        kld_p999: its 99.9 % quantile.
        same_top1: share of steps with the same most likely token.
        perplexity: of the texts' tokens.
        perplexity_full: the same in full precision.
        first_divergence: tokens of an answer before the first one that full precision would not have
            chosen, mean over answers of as many tokens as a text has steps.
        diverged: share of answers with such a token.
    """

    context: int | str
    steps: int
    kld_mean: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    same_top1: float
    perplexity: float
    perplexity_full: float
    first_divergence: float
    diverged: float


CELLS: dict[str, tuple[type[Score], dict[str, str]]] = {
    TASKS: (TaskScore, {"tasks": "task", "settings": "setting"}),
    DISTANCES: (DistanceScore, {"contexts": "context"}),
}
"""For each kind: what a cell is, and the lists of the case that name it, with the fields they fill."""


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def figures(kind: str, found: Sequence[Score]) -> dict[str, Any]:
    """Figures of all cells by name, in six digits, as a row has them.

    Args:
        kind: the row's.
        found: a score for each cell, in the order of the case.
    """
    score, cells = CELLS[kind]
    measured: dict[str, Any] = {}
    for name in (field.name for field in fields(score)):
        if name not in cells.values():
            values = [_rounded(getattr(each, name)) for each in found]
            measured[name] = values if len(set(values)) > 1 else values[0]
    return measured


def scores(row: Row) -> list[Any]:
    """The cells of a row: TaskScore or DistanceScore by its kind.

    Raises:
        ValueError: a figure is missing, of the wrong number of cells, or no share where it must be one.
    """
    score, cells = CELLS[row.kind]
    asked = list(product(*(row.get(name, ()) for name in cells)))
    found = []
    for number, cell in enumerate(asked):
        values = dict(zip(cells.values(), cell, strict=True))
        for name in (field.name for field in fields(score) if field.name not in values):
            column = row.measured.get(name)
            if column is None or (isinstance(column, list) and len(column) != len(asked)):
                raise ValueError(f"measured needs {len(asked)} values of {name}")
            values[name] = column[number] if isinstance(column, list) else column
        found.append(score(**values))
    if not found:
        raise ValueError(f"case names no {' or no '.join(cells)}")
    return found
