"""The suite `synth`: generated tasks, through a compressed cache and through the full one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffkv.hf import CacheUse
from diffkv.lab.evaluation.intervals import interval
from diffkv.lab.evaluation.results import TaskRow
from diffkv.lab.evaluation.tasks import SETTINGS, Sample, Setting, draw
from diffkv.quant import ConfigError

__all__ = ["Answerer", "Plan", "Scores", "full_scores", "task_rows", "use_fields"]

RIGHT = 1 - 1e-9


class Answerer(Protocol):
    """What answers samples: an engine with one cache."""

    def __call__(
        self, samples: Sequence[Sample], num_tokens: int
    ) -> tuple[list[str], CacheUse | None]:
        """Texts, and what the cache held; None for the full-precision one."""
        ...


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        language: member of `languages.LANGUAGES`.
        tasks: names.
        settings: easy, hard.
        num_tokens: of a prompt.
        num_samples: of a task and setting.
        seed: of the samples.
    """

    language: Any
    tasks: Sequence[str]
    settings: Sequence[Setting]
    num_tokens: int
    num_samples: int
    seed: int

    @classmethod
    def choose(
        cls,
        language: Any,
        tasks: str | None,
        settings: str | None,
        num_tokens: int,
        num_samples: int,
        seed: int,
    ) -> "Plan":
        """Read names of tasks and settings, separated by commas; None takes all.

        Raises:
            ConfigError: an unknown name.
        """
        chosen = tuple(language.tasks if tasks is None else tasks.split(","))
        for name in chosen:
            if name not in language.tasks:
                raise ConfigError(
                    f"unknown task {name!r} for the language {language.name}: there are "
                    f"{', '.join(language.tasks)}"
                )
        asked = SETTINGS if settings is None else tuple(settings.split(","))
        for name in asked:
            if name not in SETTINGS:
                raise ConfigError(f"unknown setting {name!r}: there are {', '.join(SETTINGS)}")
        return cls(
            language, chosen, tuple(name for name in SETTINGS if name in asked),
            num_tokens, num_samples, seed,
        )  # fmt: skip

    def cells(self) -> Iterator[tuple[str, Setting, list[Sample]]]:
        """Every task in every setting, with its samples."""
        for task in self.tasks:
            for setting in self.settings:
                yield (
                    task, setting,
                    draw(task, self.language, setting, self.num_tokens, self.num_samples, self.seed),
                )  # fmt: skip

    def num_answer_tokens(self, samples: Sequence[Sample]) -> int:
        """New tokens: as many as the longest answer has, or the language's own limit."""
        longest = max(len(sample.answer) for sample in samples)
        limit: int | None = self.language.max_answer_tokens
        return longest if limit is None else limit


Scores = dict[tuple[str, Setting], list[float]]
"""Share of right words of each sample, by task and setting."""


def _scores(
    plan: Plan, answer: Answerer, samples: list[Sample]
) -> tuple[list[float], CacheUse | None]:
    texts, use = answer(samples, plan.num_answer_tokens(samples))
    pairs = zip(texts, samples, strict=True)
    return [plan.language.score(text, sample.answer) for text, sample in pairs], use


def full_scores(plan: Plan, answer: Answerer) -> Scores:
    """What the full-precision cache scores; to be shared by all runs of the same plan."""
    return {
        (task, setting): _scores(plan, answer, samples)[0]
        for task, setting, samples in plan.cells()
    }


def use_fields(use: CacheUse) -> dict[str, float]:
    """The fields of `results.Use`."""
    return {
        "bytes_per_token": use.bytes_per_token,
        "ratio_bf16": use.ratio_bf16,
        "nominal_ratio_bf16": use.nominal_ratio_bf16,
        "high": min(1.0, use.high / use.tokens),
        "low": min(1.0, use.low / use.tokens),
        "dropped": use.dropped / use.tokens,
    }


def task_rows(
    plan: Plan, answer: Answerer, full: Scores, report: Callable[[TaskRow], None] = lambda _: None
) -> list[TaskRow]:
    """Answer through a compressed cache, and compare sample by sample.

    Args:
        plan: what is asked.
        answer: the engine with the compressed cache.
        full: of the same plan.
        report: is told of each row.
    """
    rows = []
    for task, setting, samples in plan.cells():
        scores, use = _scores(plan, answer, samples)
        assert use is not None, "a compressed cache says what it held"
        before = full[task, setting]
        differences = [ours - theirs for ours, theirs in zip(scores, before, strict=True)]
        num = len(scores)
        row = TaskRow(
            task=task,
            setting=setting,
            n=num,
            accuracy=sum(scores) / num,
            accuracy_full=sum(before) / num,
            exact=sum(score > RIGHT for score in scores) / num,
            exact_full=sum(score > RIGHT for score in before) / num,
            ci95_difference=interval(differences),
            **use_fields(use),
        )
        rows.append(row)
        report(row)
    return rows
