"""Where the rows of a prompt end: a prompt is decided segment by segment, at fixed positions.

A segment that is complete becomes a closed row. So does the first message of a chat, and so does what
follows the last segment, but for some tokens at the prompt's end. These are in the request's open row,
with all tokens that are generated.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["SEGMENT", "RowEnds", "first_message", "longest_row", "most_rows"]

SEGMENT = 2048
"""Tokens of a segment unless a user says otherwise; 0: prompts are decided whole, and nothing is shared.

Smaller ones keep more tokens high, since a segment's last window is. Measured in docs/policy.md.
"""

TAIL = 16
"""The rest of a prompt ends at a multiple of it, before the last token. So the same prompt finds its row
again, and so does the next turn, which may have other tokens where the answer began."""

SHORTEST = 8
"""A message, or the rest of a prompt, is a row of its own from the eighth part of a segment on."""


@dataclass(frozen=True)
class RowEnds:
    """Where the closed rows of a prompt end. It follows from the prompt's own tokens alone.

    Attributes:
        segment: tokens of a segment.
        prompt_len: tokens of the prompt.
        message: end of its first message, see `first_message`; 0: there is none.
        drops: whether tokens may be dropped. Segments alone are rows then: what a question after a
            message, or at the prompt's end, asks for would be gone before it is read.
    """

    segment: int
    prompt_len: int
    message: int = 0
    drops: bool = False

    def after(self, start: int) -> int | None:
        """Where the closed row that begins at `start` ends; None where the open row begins.

        At a multiple of the segment's size, not too near: where a message or an earlier request ended,
        one begins elsewhere. It is then at least half as long as others.
        """
        if not self.segment:
            return None
        shortest = start + self.segment / SHORTEST
        end = -(-(start + max(1, self.segment // 2)) // self.segment) * self.segment
        if not self.drops and shortest <= self.message < min(end, self.prompt_len):
            return self.message
        # One that ends with its prompt is of no use to the same prompt: its last token is computed anew
        if end < self.prompt_len or (self.drops and end == self.prompt_len):
            return end
        if self.drops:
            return None
        end = (self.prompt_len - 1) // TAIL * TAIL
        return end if end >= shortest else None

    def up_to(self, start: int, stop: int) -> list[int]:
        """Where rows end, up to and with `stop`, if one begins at `start`."""
        ends, end = [], self.after(start)
        while end is not None and end <= stop:
            ends.append(end)
            end = self.after(end)
        return ends

    def is_last(self, end: int) -> bool:
        """Whether no more than some tokens at the prompt's end follow a row that ends there."""
        return end >= self.prompt_len - TAIL

    def cuts(self, start: int, first: int, stop: int) -> list[tuple[int, int, bool]]:
        """The parts of some tokens of the prompt, by the rows that they belong to.

        Args:
            start: first token of the row that `first` belongs to, where the open row begins.
            first: first of these tokens.
            stop: end of these tokens.

        Returns:
            (first, stop, whether it completes a closed row) of each part.
        """
        bounds = [first, *self.up_to(start, stop)]
        parts = [(a, b, True) for a, b in pairwise(bounds)]
        return parts if bounds[-1] == stop else [*parts, (bounds[-1], stop, False)]


def first_message(tokens: Sequence[int], ends: Collection[int], segment: int) -> int:
    """End of the first message that is long enough for a row of its own, or 0.

    Args:
        tokens: a prompt's.
        ends: tokens that end a message in the model's chats.
        segment: tokens of a segment.
    """
    if not segment:
        return 0
    for place in range(-(-segment // SHORTEST) - 1, len(tokens)):
        if tokens[place] in ends:
            return place + 1
    return 0


def longest_row(segment: int) -> int:
    """Most tokens of a segment: it may begin just after the middle of one."""
    return segment + segment // 2


def most_rows(num_tokens: int, segment: int) -> int:
    """Closed rows of a prompt of so many tokens that is computed from its first on."""
    return num_tokens // segment + 2 if segment else 0
