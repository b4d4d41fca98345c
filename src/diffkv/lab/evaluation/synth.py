"""The suite `synth`: generated tasks, through a compressed cache and through the full one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffkv.lab.evaluation.intervals import interval
from diffkv.lab.evaluation.results import TaskScore
from diffkv.lab.evaluation.tasks import SETTINGS, Sample, Setting, draw
from diffkv.quant import ConfigError
from diffkv.use import CacheUse

__all__ = ["Answerer", "Plan", "Scores", "full_scores", "paired_score", "task_scores"]

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
        num_tokens: length of a prompt.
        num_samples: samples for each task and setting.
        seed: draws the samples.
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
            language,
            chosen,
            tuple(name for name in SETTINGS if name in asked),
            num_tokens,
            num_samples,
            seed,
        )

    def case(self) -> dict[str, Any]:
        """The plan as rows name it."""
        return {
            "suite": "synth",
            "language": self.language.name,
            "tasks": list(self.tasks),
            "settings": list(self.settings),
            "tokens": self.num_tokens,
            "samples": self.num_samples,
            "seed": self.seed,
        }

    def cells(self) -> Iterator[tuple[str, Setting, list[Sample]]]:
        """Every task in every setting, with its samples."""
        for task in self.tasks:
            for setting in self.settings:
                yield (
                    task,
                    setting,
                    draw(
                        task, self.language, setting, self.num_tokens, self.num_samples, self.seed
                    ),
                )

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


def paired_score(
    task: str, setting: str, after: Sequence[float], before: Sequence[float], use: CacheUse
) -> TaskScore:
    """Compare two caches sample by sample.

    Args:
        task: its name.
        setting: the task's.
        after: share of right words of each sample, through the compressed cache.
        before: the same through the full one.
        use: what the compressed cache held.
    """
    n = len(after)
    low, high = interval([ours - theirs for ours, theirs in zip(after, before, strict=True)])
    return TaskScore(
        n=n,
        task=task,
        setting=setting,
        accuracy=sum(after) / n,
        accuracy_full=sum(before) / n,
        exact=sum(score > RIGHT for score in after) / n,
        exact_full=sum(score > RIGHT for score in before) / n,
        ci95_low=low,
        ci95_high=high,
        **use.per_token(),
    )


def task_scores(
    plan: Plan,
    answer: Answerer,
    full: Scores,
    report: Callable[[TaskScore], None] = lambda score: None,
) -> list[TaskScore]:
    """Answer through a compressed cache, and compare sample by sample.

    Args:
        plan: what is asked.
        answer: the engine with the compressed cache.
        full: full precision's answers to the same plan.
        report: is told of each score.
    """
    found = []
    for task, setting, samples in plan.cells():
        scores, use = _scores(plan, answer, samples)
        assert use is not None, "a compressed cache says what it held"
        found.append(paired_score(task, setting, scores, full[task, setting], use))
        report(found[-1])
    return found
