"""What a model is asked, and how much of an answer is lost."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from diffkv.lab.evaluation.languages import LANGUAGES, plain
from diffkv.lab.evaluation.tasks import Answer, draw
from diffkv.quant import ConfigError

__all__ = [
    "AGREEMENT",
    "ANYWHERE",
    "PLACE",
    "RIGHT_WORDS",
    "Question",
    "agreement",
    "as_answer",
    "choose",
    "digest",
    "metric",
    "synthetic",
]

RIGHT_WORDS = "right_words"
"""Loss: the share of right words in full precision, minus that of the compressed answer."""

AGREEMENT = "agreement"
"""Loss: the share of an answer's tokens from the first one on that differs from full precision."""

PLACE, ANYWHERE = "reference", "english"
"""Languages whose way of scoring fits any text: words at their places, or phrases anywhere."""


@dataclass(frozen=True)
class Question:
    """A prompt.

    Attributes:
        prompt: the text.
        answer: the right answer; None if none is known, and then the full-precision one counts.
        max_tokens: new tokens.
        language: one of `diffkv.lab.evaluation.languages`; scores the answer.
    """

    prompt: str
    answer: Answer | None
    max_tokens: int
    language: str = PLACE

    def score(self, text: str) -> float:
        """Share of the answer's words that a text has right."""
        assert self.answer is not None
        return LANGUAGES[self.language].score(text, self.answer)


def as_answer(text: str, language: str) -> Answer:
    """A right answer as it is scored: word by word at their places, or as a phrase anywhere.

    Raises:
        ConfigError: no word is in it.
    """
    if not (plain(text) if language == ANYWHERE else text.split()):
        raise ConfigError(f"the answer {text!r} has no word that could be found in a text")
    words = text.split() if language == PLACE else [text]
    return tuple((word, True) for word in words)


def synthetic(language: str, num_tokens: int, num_samples: int, seed: int) -> list[Question]:
    """Questions about facts in the context, of every task that a language has words for.

    The question ends the prompt, so prompt and question are compressed together, as an engine does
    with a first request.

    Args:
        language: name in `diffkv.lab.evaluation.languages.LANGUAGES`.
        num_tokens: length of a prompt.
        num_samples: samples of all tasks together, the same number of each or one less.
        seed: draws all choices.
    """
    spoken = LANGUAGES[language]
    questions = []
    for index, task in enumerate(spoken.tasks):
        num = len(range(index, num_samples, len(spoken.tasks)))
        for sample in draw(task, spoken, "easy", num_tokens, num, seed):
            num_new = spoken.max_answer_tokens or len(sample.answer)
            questions.append(Question(sample.prompt, sample.answer, num_new, language))
    return questions


def choose(questions: Sequence[Question], n: int | None, seed: int) -> list[Question]:
    """A random sample in random order, so that the first ones are like all."""
    order = np.random.default_rng(seed).permutation(len(questions))
    return [questions[i] for i in order[:n]]


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 of everything that is asked."""
    rows = "".join(json.dumps(asdict(question), sort_keys=True) + "\n" for question in questions)
    return hashlib.sha256(rows.encode()).hexdigest()


def metric(questions: Sequence[Question]) -> str:
    """How the questions are scored.

    Raises:
        ConfigError: some have a right answer and others have none.
    """
    with_answer = sum(question.answer is not None for question in questions)
    if with_answer not in (0, len(questions)):
        raise ConfigError(
            f"{with_answer} of {len(questions)} prompts have an answer: give one to all or to none"
        )
    return RIGHT_WORDS if with_answer else AGREEMENT


def agreement(token_ids: Sequence[int], full: Sequence[int]) -> float:
    """Share of the full-precision answer's tokens before the first one that differs."""
    for index, token in enumerate(full):
        if index >= len(token_ids) or token_ids[index] != token:
            return index / len(full)
    return 1.0
