"""What every task is made of: a context, a question about it, and the only right answer.

A task is a function of a seeded generator, a language and a length. The language turns keys, values and
filler into words, so that one task serves the shipped model, which knows its own words only, and any
other one. More tasks: add a function to `TASKS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["Sample"]


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        context: what is in the cache when the question comes.
        filler: words without a fact, that end the context in the setting `hard`.
        question: what is asked.
        answer: words of the only right answer.
        is_scored: of each word of the answer, whether it counts: what the question says does not.
    """

    context: str
    filler: str
    question: str
    answer: tuple[str, ...]
    is_scored: tuple[bool, ...]

    def prompt(self, setting: str) -> tuple[str, str]:
        """The text that is compressed, and the text that comes afterwards."""
        if setting == "easy":
            return f"{self.context} {self.question}", ""
        return f"{self.context} {self.filler}", self.question


class Language(Protocol):
    """How facts and questions are written."""


Task = Callable[[np.random.Generator, Language, int], Sample]
"""(generator, language, tokens of context and filler) -> a sample."""

TASKS: dict[str, Task] = {}
"""Every task by name."""


def names(language: Language) -> Sequence[str]:
    """The tasks that a language has words for."""
    return tuple(TASKS)
