"""One forward pass over a cache: chunks of prompts, and the places of generated tokens.

All that the layers of a step have in common is put on the device once, without waiting for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from diffkv.packing import spans_of
from diffkv.prefill import Spans
from diffkv.state import DecodePlan
from diffkv.uploads import Place
from diffkv.waves import Wave

__all__ = ["Passing", "PromptChunk", "PromptPlan", "Step"]


@dataclass(frozen=True)
class PromptChunk:
    """Some tokens of one request's prompt, as a span of a packed batch.

    Attributes:
        slot: slot of the request's open row.
        span: rows of the batch.
        num_stored: tokens of the request that came before, those of closed rows included.
        prompt_len: tokens of the whole prompt.
        closing: slots for the rows whose segments are complete with this chunk.
    """

    slot: int
    span: slice
    num_stored: int
    prompt_len: int
    closing: tuple[int, ...] = ()

    @property
    def num_new(self) -> int:
        """Tokens of this chunk."""
        return int(self.span.stop - self.span.start)

    @property
    def end(self) -> int:
        """Tokens of the request that are in the cache after this chunk."""
        return self.num_stored + self.num_new

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete with this chunk."""
        return self.end == self.prompt_len


@dataclass(frozen=True)
class PromptPlan:
    """The chunks of prompts of a step; their tokens are packed one chunk after the other.

    Attributes:
        rows: rows of their tokens in the step's batch.
        waves: what is done one after the other, since a segment reads the ones before it as they are
            stored.
    """

    rows: slice | Tensor
    waves: tuple[Wave, ...]

    @cached_property
    def completes_chunks(self) -> bool:
        """Whether any rows are complete of which no token came in earlier chunks."""
        return any(each.rows is not None for wave in self.waves for each in wave.complete)


@dataclass(frozen=True)
class Passing:
    """Tokens of requests that end with this step: a request's attend to each other, and are not stored.

    Attributes:
        rows: rows of the batch.
        spans: whose they are.
    """

    rows: slice | Tensor
    spans: Spans

    @classmethod
    def of(cls, spans: Sequence[slice], place: Place) -> "Passing":
        """Those of some spans of the batch."""
        lengths = [span.stop - span.start for span in spans]
        return cls(spans_of(spans, place), Spans.of(lengths, lengths, place))


@dataclass(frozen=True)
class Step:
    """One forward pass over the cache; the same for every layer.

    Attributes:
        prompts: chunks of prompts; None if there are none.
        decode_rows: [R] int64, rows of the batch that are generated tokens, or a slice of them.
        decode: places of those tokens; None if there are none.
        passing: tokens that are not stored; None if there are none.
    """

    prompts: PromptPlan | None
    decode_rows: slice | Tensor
    decode: DecodePlan | None
    passing: Passing | None
