"""The rows of the sequences of a batch: each has slots of its own, and shares none."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffkv.cache import DiffKVCache, PromptChunk
from diffkv.policy import Thresholds

__all__ = ["SequenceRows", "paddings"]


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
        """Begin a prompt that makes the sequence `num_tokens` tokens long."""
        self.slot = self.slots.pop(0)
        self.reopen(pages, num_tokens, thresholds)

    def reopen(self, pages: DiffKVCache, num_tokens: int, thresholds: Thresholds) -> None:
        """Tell a pool of the rows that there are."""
        pages.open(self.slot, num_tokens, thresholds, self.chain, self.starts)

    def check_turn(self, pages: DiffKVCache, num_seen: int, num_tokens: int) -> None:
        """See whether another turn is possible, see `turn`.

        Raises:
            ValueError: the sequence would have more rows than it can have.
        """
        ends = replace(pages.ends(self.slot), prompt_len=num_tokens)
        needed = 1 + len(ends.up_to(num_seen, num_tokens))
        if needed > len(self.slots):
            raise ValueError(
                f"another turn needs {needed} more rows, and {len(self.slots)} are left of "
                f"{len(self.rows) + len(self.slots)}: begin a new cache"
            )

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


def paddings(mask: Tensor | None, batch: int, num_tokens: int) -> list[int]:
    """Where each row of a batch begins.

    Args:
        mask: [batch, num_tokens] bool, False for padding; None: there is none.
        batch: sequences.
        num_tokens: tokens of a row, padding included.

    Raises:
        ValueError: padding that is not on the left, a row of nothing else, or no mask of padding.
    """
    if mask is None:
        return [0] * batch
    if mask.shape != (batch, num_tokens):
        raise ValueError(
            f"attention_mask must say of each token whether it is padding, [{batch}, {num_tokens}]: a "
            f"mask for each query, as one of shape {list(mask.shape)}, is not supported"
        )
    lengths = mask.sum(1)
    expected = torch.arange(num_tokens, device=mask.device) >= (num_tokens - lengths)[:, None]
    if not torch.equal(mask, expected) or lengths.min() < 1:
        raise ValueError(
            "pad prompts on the left (padding_side='left'), each with at least one token"
        )
    return (num_tokens - lengths).tolist()
