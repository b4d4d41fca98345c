"""How attention works on a batch, by its size: few rows wait for the largest chunk, many for memory."""

from typing import NamedTuple

from diffkv.kernels.triton.closed import longer
from diffkv.kernels.triton.constants import cdiv
from diffkv.kernels.triton.workspace import MOST_REGISTERS, Workspace

__all__ = ["Batch"]

FEW_ITEMS = 16
"""Items that a row has at most, usually, where rows are few."""

FEW_PROGRAMS = 8
"""Programs for each multiprocessor where items are few: each may have `MOST_REGISTERS`."""

LIST_COUNTS = 128, 1024, 2048
"""Rows that are counted at a time where they are few, some and many."""

MERGED = 16, 16, 8
"""Chunks whose outputs are merged at a time, likewise: the fewer, the more programs run at once."""


class Batch(NamedTuple):
    """What launches of `attend` are given by the number of rows (request, head).

    Attributes:
        programs: that attend, for each multiprocessor.
        registers: of each of their threads, at most.
        chunk_tokens: high tokens of the smallest chunk: twice as many in a crowd, where a row for every
            other program keeps all busy.
        longer: see `closed.longer`.
        counted: rows at a time, where work is listed.
        merged: chunks whose outputs are merged at a time.
    """

    programs: int
    registers: int
    chunk_tokens: int
    longer: int
    counted: int
    merged: int

    @classmethod
    def of(cls, rows: int, segment: int, work: Workspace) -> "Batch":
        """That of so many rows of requests with segments of so many tokens."""
        tuning = work.tuning
        programs, registers = tuning.programs, tuning.max_registers
        at_once = work.multiprocessors * programs
        is_crowd = 2 * rows >= at_once
        is_few = not is_crowd and rows < cdiv(at_once, FEW_ITEMS)
        if is_few:
            programs, registers = min(programs, FEW_PROGRAMS), MOST_REGISTERS
        size = 0 if is_few else 1 + is_crowd
        return cls(
            programs, registers, tuning.chunk_tokens * (1 + is_crowd), longer(segment, is_crowd),
            LIST_COUNTS[size], MERGED[size],
        )  # fmt: skip
