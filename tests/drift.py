"""How far two runs of an engine are apart.

Drift is measured in logits, not in tokens alone, since after one token that differs all others do. It is
the mean of |log p - log p'| over the five likeliest tokens of the first run, over all steps up to the
first where the two runs choose differently, that one included: so far both have read the same text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["LIKELIEST_KEPT", "Answer", "answer", "drift", "num_equal"]

LIKELIEST = 5
LIKELIEST_KEPT = 20
"""Tokens whose log-probabilities an engine is asked for."""


@dataclass(frozen=True)
class Answer:
    """Tokens of one answer, and for each the log-probabilities of the likeliest tokens."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]


def answer(output: Any) -> Answer:
    """What came of one prompt."""
    (out,) = output.outputs
    return Answer(
        list(out.token_ids),
        [{token: each.logprob for token, each in step.items()} for step in out.logprobs],
    )


def drift(stock: Sequence[Answer], ours: Sequence[Answer]) -> float:
    """The measure of this module's docstring, in nats."""
    differences = []
    for ref, our in zip(stock, ours, strict=True):
        for step, theirs in enumerate(ref.logprobs):
            mine = our.logprobs[step]
            floor = min(mine.values())  # a token that fell out of those that were kept is below it
            likeliest = sorted(theirs, key=theirs.__getitem__)[-LIKELIEST:]
            differences += [abs(theirs[token] - mine.get(token, floor)) for token in likeliest]
            if ref.token_ids[step] != our.token_ids[step]:
                break
    return float(np.mean(differences))


def num_equal(stock: Sequence[Answer], ours: Sequence[Answer]) -> list[int]:
    """Tokens of each answer before the first that differs."""
    counts = []
    for ref, our in zip(stock, ours, strict=True):
        pairs = enumerate(zip(ref.token_ids, our.token_ids, strict=True))
        counts.append(next((i for i, (a, b) in pairs if a != b), len(ref.token_ids)))
    return counts
