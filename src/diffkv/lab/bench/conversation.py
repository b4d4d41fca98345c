"""Conversations under way: what is asked next, and what became of the turns that are done."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Conversation", "by_turn"]

MS = 1e3
PERCENTILES = (50, 95)


@dataclass
class Conversation:
    """A conversation: the prompt of a turn is every token so far, answers included, and some new ones.

    Attributes:
        turns: new tokens of each turn.
        max_tokens: tokens of each answer.
        prompt: token ids of the turn that is under way, or of the last one.
        answers: token ids of those that are complete.
        prompt_lens: tokens of the prompts so far.
        cached: tokens of them that were not computed again.
        waited: seconds from asking to an answer's first token.
    """

    turns: Sequence[list[int]]
    max_tokens: int
    prompt: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    prompt_lens: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    _answer: list[int] = field(default_factory=list)
    _asked_at: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether every turn has its answer."""
        return len(self.answers) == len(self.turns)

    def ask(self, now: float) -> list[int]:
        """Begin the next turn at a time in seconds: its prompt."""
        assert len(self.prompt_lens) == len(self.answers) < len(self.turns), "a turn is under way"
        last = self.answers[-1] if self.answers else []
        self.prompt = [*self.prompt, *last, *self.turns[len(self.answers)]]
        self.prompt_lens.append(len(self.prompt))
        self._asked_at = now
        return self.prompt

    def hear(self, tokens: Sequence[int], is_complete: bool, cached: int, now: float) -> None:
        """Take what has come of the answer.

        Args:
            tokens: its tokens since the last time.
            is_complete: whether there are no more to come.
            cached: tokens of the prompt that were not computed again.
            now: time in seconds.
        """
        if tokens and len(self.waited) < len(self.prompt_lens):
            self.waited.append(now - self._asked_at)
            self.cached.append(cached)
        self._answer.extend(tokens)
        if is_complete:
            self.answers.append(self._answer)
            self._answer = []


def by_turn(conversations: Sequence[Conversation]) -> dict[str, Any]:
    """Figures of conversations that are over and have as many turns each.

    Returns:
        Times to first token over all turns (`mean_ttft_ms`, `p50_ttft_ms`, `p95_ttft_ms`); and lists
        with an entry for each turn: the same, tokens of a prompt, and the share of them that was cached.
    """
    waited = np.array([each.waited for each in conversations]) * MS
    prompts = np.array([each.prompt_lens for each in conversations])
    cached = np.array([each.cached for each in conversations])
    turns = {name: values.tolist() for name, values in _summary(waited, axis=0).items()}
    return {
        **{name: float(value) for name, value in _summary(waited, axis=None).items()},
        **{f"{name}_by_turn": values for name, values in turns.items()},
        "prompt_tokens_by_turn": prompts.mean(0).tolist(),
        "cached_share_by_turn": (cached.sum(0) / prompts.sum(0)).tolist(),
    }


def _summary(ms: np.ndarray, axis: int | None) -> dict[str, Any]:
    middle = np.percentile(ms, PERCENTILES, axis=axis)
    names = [f"p{percentile}_ttft_ms" for percentile in PERCENTILES]
    return {"mean_ttft_ms": ms.mean(axis), **dict(zip(names, middle, strict=True))}
