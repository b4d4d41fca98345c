"""The rows of the sequences of a batch: each has slots of its own, and shares none."""

from dataclasses import dataclass

from diffkv.cache import DiffKVCache, PromptChunk
from diffkv.policy import Thresholds

__all__ = ["SequenceRows"]


@dataclass
class SequenceRows:
    """The rows of one sequence.

    Attributes:
        slots: slots that it has not used yet.
        chain: closed rows.
        starts: where the tokens of each of them begin, and where the open row's do.
        slot: slot of the open row; -1 before there is one.
    """

    slots: list[int]
    chain: tuple[int, ...] = ()
    starts: tuple[int, ...] = (0,)
    slot: int = -1

    @property
    def rows(self) -> list[int]:
        """Slots of all rows."""
        return [*self.chain, self.slot]

    def open(self, pages: DiffKVCache, num_tokens: int, thresholds: Thresholds) -> None:
        """Begin a prompt that makes the sequence `num_tokens` tokens long.

        Raises:
            ValueError: the sequence has as many rows as it can have.
        """
        if not self.slots:
            raise ValueError(
                f"the cache has no room for another turn after {len(self.chain)} rows: raise max_tokens"
            )
        self.slot = self.slots.pop(0)
        self.reopen(pages, num_tokens, thresholds)

    def reopen(self, pages: DiffKVCache, num_tokens: int, thresholds: Thresholds) -> None:
        """Tell a pool of the rows that there are."""
        pages.open(self.slot, num_tokens, thresholds, self.chain, self.starts)

    def turn(
        self, pages: DiffKVCache, num_seen: int, num_tokens: int, thresholds: Thresholds
    ) -> None:
        """Close the open row, which holds tokens up to `num_seen`, and begin another prompt."""
        pages.end([self.slot])
        self.chain, self.starts = (*self.chain, self.slot), (*self.starts, num_seen)
        self.open(pages, num_tokens, thresholds)

    def chunk(
        self, pages: DiffKVCache, span: slice, num_stored: int, num_tokens: int
    ) -> PromptChunk:
        """All tokens of a prompt: those of `span` in the batch, from `num_stored` on."""
        ends = pages.ends(self.slot).up_to(self.starts[-1], num_tokens)
        closing = tuple(self.slots.pop(0) for _ in ends)
        self.chain, self.starts = (*self.chain, *closing), (*self.starts, *ends)
        return PromptChunk(self.slot, span, num_stored, num_tokens, closing)
