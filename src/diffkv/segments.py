"""Where the rows of a prompt end: a prompt is decided segment by segment, at fixed positions.

A segment that is complete becomes a closed row, and so does what follows the last one, but for some
tokens at the prompt's end. These are in the request's open row, with all tokens that are generated.
"""

from itertools import pairwise

__all__ = ["SEGMENT", "TAIL", "cuts", "longest_row", "most_rows", "next_end", "row_ends"]

SEGMENT = 1024
"""Tokens of a segment unless a user says otherwise; 0: prompts are decided whole, and nothing is shared.

Smaller ones keep more tokens high, since a segment's last window is. Measured in docs/policy.md.
"""

TAIL = 16
"""The row before the open one ends at a multiple of it, before the prompt's last token. So the same
prompt finds it again, and the next turn too, which may begin an answer with other tokens."""

SHORTEST = 1 / 8
"""Share of a segment that the rest of a prompt has at least if a row is closed for it."""


def next_end(start: int, segment: int, prompt_len: int) -> int | None:
    """Where the closed row that begins at `start` ends; None where the open row begins.

    At a multiple of the segment's size, not too near: only where a request ended before, and another goes
    on from there, does one begin elsewhere. It is then at least half as long as others. Where the prompt
    has not so many tokens more, shortly before its end, if there is something to keep.
    """
    if not segment:
        return None
    end = -(-(start + segment // 2) // segment) * segment
    if end <= prompt_len:
        return end
    end = (prompt_len - 1) // TAIL * TAIL
    return end if end - start >= segment * SHORTEST else None


def longest_row(segment: int) -> int:
    """Most tokens of a segment: it may begin just after the middle of one."""
    return segment + segment // 2


def most_rows(num_tokens: int, segment: int) -> int:
    """Closed rows of a prompt of so many tokens that is computed from its first on."""
    return num_tokens // segment + 1 if segment else 0


def row_ends(start: int, stop: int, segment: int, prompt_len: int) -> list[int]:
    """Where rows end, up to and with `stop`, if one begins at `start`."""
    ends, end = [], next_end(start, segment, prompt_len)
    while end is not None and end <= stop:
        ends.append(end)
        end = next_end(end, segment, prompt_len)
    return ends


def cuts(
    start: int, first: int, stop: int, segment: int, prompt_len: int
) -> list[tuple[int, int, bool]]:
    """The parts of some tokens of a prompt, by the rows that they belong to.

    Args:
        start: first token of the row that `first` belongs to, where the open row begins.
        first: first of these tokens.
        stop: end of these tokens.
        segment: tokens of a segment.
        prompt_len: tokens of the whole prompt.

    Returns:
        (first, stop, whether it completes a closed row) of each part.
    """
    bounds = [first, *row_ends(start, stop, segment, prompt_len)]
    parts = [(a, b, True) for a, b in pairwise(bounds)]
    return parts if bounds[-1] == stop else [*parts, (bounds[-1], stop, False)]
