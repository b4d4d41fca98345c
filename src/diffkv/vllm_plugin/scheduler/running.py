"""What a running request holds, and what its next step may need at worst.

Whatever is computed is paid for before the step: a segment that is completed by all of its tokens high,
tokens that wait for the rest of theirs by the pages that they take as they are, the rest of a prompt
and generated tokens by the worst that the latest report leaves possible. A layer at a time is
converted, and in none do the tokens that waited and the rows that they become exist both. So at any
time some layers hold what they held before the step, the others what they hold after it. The bounds of
all layers are the same, so together they never exceed the larger of the two times their number.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffkv.policy import Thresholds
from diffkv.segments import RowEnds
from diffkv.shape import PoolShape
from diffkv.vllm_plugin.messages import PagesHeld
from diffkv.vllm_plugin.scheduler.estimate import RowSizes
from diffkv.vllm_plugin.scheduler.rows import Row

__all__ = ["Bounds", "Need", "Running"]


@dataclass(eq=False)
class Running:
    """A request from its admission, or resumption, to its end or preemption.

    Attributes:
        request: vLLM's.
        thresholds: its own.
        ends: where the closed rows of its prompt end: of all tokens that it had then.
        epoch: number of this admission.
        slot: slot of its open row.
        chain: closed rows before that.
        start: first token of the open row, when all steps that were scheduled are done.
        num_tokens: tokens that are stored then.
        blocks: those of the open row; the first is the request's identity in block tables.
        closing: rows that the step being scheduled closes.
        in_flight: (tokens after it, blocks of the open row) of each step of the prompt that is not
            reported yet.
        report: the latest.
        paid_until: tokens up to which its blocks are enough for generated ones.
        failed: whether the request is too large for the whole pool.
        num_resets: how often rows had been cleared when it began.
        prompt_len: tokens of its prompt.
    """

    request: Any
    thresholds: Thresholds
    ends: RowEnds
    epoch: int
    slot: int
    chain: list[Row]
    start: int
    num_tokens: int
    blocks: list[Any] = field(default_factory=list)
    closing: list[Row] = field(default_factory=list)
    in_flight: deque[tuple[int, int]] = field(default_factory=deque)
    report: PagesHeld | None = None
    paid_until: int = 0
    failed: bool = False
    num_resets: int = 0
    prompt_len: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_len = self.ends.prompt_len

    def is_paid(self, num_tokens: int) -> bool:
        """Whether a step generates a token that the blocks are enough for."""
        return self.num_tokens < num_tokens <= self.paid_until

    @property
    def is_settled(self) -> bool:
        """Whether the pages of all that it has stored are known."""
        return not self.in_flight and all(row.maker is None for row in self.chain)


@dataclass(frozen=True)
class Need:
    """What a step of a request may need.

    Attributes:
        rows: (first token, end) of each row that it closes.
        row_blocks: blocks of each.
        open_blocks: blocks of the open row, for as long as the step runs.
    """

    rows: tuple[tuple[int, int], ...]
    row_blocks: tuple[int, ...]
    open_blocks: int

    def missing(self, running: Running) -> int:
        """Blocks that the step takes from the pool.

        What the open row will not need any more goes to the rows that are closed.
        """
        return max(0, self.open_blocks + sum(self.row_blocks) - len(running.blocks))

    def slots(self, running: Running) -> int:
        """Slots that the step takes."""
        return len(self.rows) + (running.slot < 0)


class Bounds:
    """Worst cases in blocks: one block is a page for every layer.

    Args:
        shape: the pool's.
    """

    def __init__(self, shape: PoolShape) -> None:
        self._shape = shape
        self._exact = shape.layout.exact()

    def blocks(self, num_pages: int) -> int:
        """Blocks that pay for so many pages."""
        return -(-num_pages // self._shape.num_layers)

    def _decided(self, num_tokens: int) -> int:
        """Most pages of tokens, however they are tiered."""
        return self._shape.num_heads * self._shape.layout.max_pages(num_tokens)

    def waiting(self, num_tokens: int) -> int:
        """Pages of tokens that wait, as the model made them."""
        return self._shape.num_heads * self._exact.max_pages(num_tokens)

    def _open(self, running: Running, start: int, num_tokens: int) -> int:
        """Most pages of an open row that begins at `start`, with `num_tokens` tokens of the request."""
        if num_tokens < running.prompt_len:
            return self.waiting(num_tokens - start)
        pages = self._decided(num_tokens - start)
        report = running.report
        if report is not None and report.num_tokens >= running.prompt_len:
            more = num_tokens - report.num_tokens
            if 0 < more <= len(report.growth):
                growth = report.growth[more - 1]
            else:
                growth = self._shape.num_heads * self._shape.layout.max_new_pages(more)
            pages = min(pages, report.num_pages + growth)
        return pages

    def horizon(self, running: Running) -> int:
        """Tokens for which a request keeps its blocks: those of the steps that were scheduled.

        The next generated token is among them where the report bounds it: its blocks would be given
        back and taken again in every step.
        """
        report, next_one = running.report, running.num_tokens + 1
        if report is None or report.num_tokens < running.prompt_len:
            return running.num_tokens
        is_bounded = next_one - report.num_tokens <= len(report.growth)
        return next_one if is_bounded else running.num_tokens

    def held(self, running: Running, horizon: int) -> int:
        """Blocks that the open row may need for the tokens of its horizon, or before."""
        bound = max(1, self.blocks(self._open(running, running.start, horizon)))
        if not running.in_flight:
            return bound
        return max(bound, *(blocks for _, blocks in running.in_flight))

    def step(self, running: Running, num_tokens: int) -> Need:
        """What a step may need after which the request has `num_tokens` tokens."""
        first, stop = running.num_tokens, min(num_tokens, running.prompt_len)
        rows: Sequence[tuple[int, int]] = ()
        before = 0
        if first < stop:
            ends = running.ends.up_to(running.start, stop)
            rows = list(zip([running.start, *ends], ends, strict=False))
            before = self.waiting(first - running.start)
        pages = [self._decided(end - start) for start, end in rows]
        after = self._open(running, rows[-1][1] if rows else running.start, num_tokens)
        open_pages = max(after, before - sum(pages))
        return Need(tuple(rows), tuple(map(self.blocks, pages)), max(1, self.blocks(open_pages)))

    def promised(self, running: Running) -> int:
        """Blocks that a prompt which is being computed wants beside its own until its row is complete.

        Who is admitted leaves them free, or they would preempt each other in the middle of segments.
        """
        if running.failed or running.num_tokens >= running.prompt_len:
            return 0
        end = running.ends.after(running.start) or running.prompt_len
        return max(0, self.blocks(self.waiting(end - running.start)) - len(running.blocks))

    def expected(self, running: Running, sizes: RowSizes, tokens_of_a_step: int) -> int:
        """Blocks that a prompt is expected to take beyond the rows that it found.

        If several steps compute it, the tokens of its last row wait as they are.
        """
        first, stop = running.start, running.prompt_len
        blocks = 0
        for start, end, _ in running.ends.cuts(first, first, stop):
            pages = sizes.expected(running.thresholds, end - start)
            if running.ends.is_last(end) and stop - first > tokens_of_a_step:
                pages = max(pages, self.waiting(end - start))
            blocks += self.blocks(pages)
        return max(1, blocks)
