"""Where the rows of a prompt end: a prompt is decided segment by segment, at fixed positions.

A segment that is complete becomes a closed row. What follows the last one is in the request's open row,
with all tokens that are generated.
"""

from itertools import pairwise

__all__ = ["SEGMENT", "cuts", "longest_row", "next_end", "row_ends"]

SEGMENT = 1024
"""Tokens of a segment unless a user says otherwise; 0: prompts are decided whole, and nothing is shared.

Smaller ones keep more tokens high, since a segment's last window is. Measured in docs/policy.md.
"""


def next_end(start: int, segment: int) -> int | None:
    """Where the segment that begins at `start` ends: at a multiple of its size, not too near.

    Only where a request ended before, and another goes on from there, does one begin elsewhere. It is
    then at least half as long as others.
    """
    return -(-(start + segment // 2) // segment) * segment if segment else None


def longest_row(segment: int) -> int:
    """Most tokens of a segment: it may begin just after the middle of one."""
    return segment + segment // 2


def row_ends(start: int, stop: int, segment: int) -> list[int]:
    """Where segments end, up to and with `stop`, if one begins at `start`."""
    ends, end = [], next_end(start, segment)
    while end is not None and end <= stop:
        ends.append(end)
        end = next_end(end, segment)
    return ends


def cuts(start: int, first: int, stop: int, segment: int) -> list[tuple[int, int, bool]]:
    """The parts of some tokens of a prompt, by the segments that they belong to.

    Args:
        start: first token of the segment that `first` belongs to, where the open row begins.
        first: first of these tokens.
        stop: end of these tokens.
        segment: tokens of a segment.

    Returns:
        (first, stop, whether it completes a segment) of each part.
    """
    bounds = [first, *row_ends(start, stop, segment)]
    parts = [(a, b, True) for a, b in pairwise(bounds)]
    return parts if bounds[-1] == stop else [*parts, (bounds[-1], stop, False)]
