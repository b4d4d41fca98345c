"""What a model is asked, and how much of an answer is lost."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from diffkv.quant import ConfigError

__all__ = ["AGREEMENT", "METRIC_HELP", "RIGHT_WORDS", "Question", "agreement", "choose", "digest",
           "metric", "right_words"]  # fmt: skip

RIGHT_WORDS = "right_words"
AGREEMENT = "agreement"

METRIC_HELP = {
    RIGHT_WORDS: "share of right words, full precision minus compressed",
    AGREEMENT: "share of an answer's tokens from the first one that differs from full precision",
}
"""What the loss of a metric is."""


@dataclass(frozen=True)
class Question:
    """A prompt.

    Attributes:
        prompt: the text.
        answer: the right answer; None if none is known, and then the full-precision one counts.
        max_tokens: new tokens.
    """

    prompt: str
    answer: str | None
    max_tokens: int


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


def right_words(text: str, answer: str) -> float:
    """Share of the answer's words that stand at their place in a text."""
    words = answer.split()
    pairs = zip(text.split(), words, strict=False)
    return sum(word == right for word, right in pairs) / len(words)


def agreement(token_ids: Sequence[int], full: Sequence[int]) -> float:
    """Share of the full-precision answer's tokens before the first one that differs."""
    for index, token in enumerate(full):
        if index >= len(token_ids) or token_ids[index] != token:
            return index / len(full)
    return 1.0
