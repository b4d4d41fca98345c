"""One forward pass over a cache: chunks of prompts, and the places of generated tokens.

All that the layers of a step have in common is put on the device once, without waiting for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from diffkv.layout import PageLayout
from diffkv.packing import Packing, RowPlaces, spans_of
from diffkv.policies import Policy
from diffkv.policy import Thresholds, threshold
from diffkv.prefill import Spans
from diffkv.state import DecodePlan, PoolState
from diffkv.uploads import Place

__all__ = [
    "Completion",
    "Part",
    "Passing",
    "PromptChunk",
    "PromptPlan",
    "Scoring",
    "Step",
    "Waiting",
    "Wave",
]


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
class Part:
    """Tokens of a chunk that belong to one segment.

    Attributes:
        slot: slot of the request's open row, where tokens wait for the rest of their segment.
        chain: closed rows before it.
        starts: where the tokens of each of them begin in the request, and where the open row's do.
        first: index of the first token in its request.
        stop: index after the last one.
        end: index after the last token of the chunk.
        row_end: index after the last token of the segment, or of the prompt if it ends before.
        target: slot of the row that is complete with it; None if it has to wait.
        is_last: whether the prompt is complete with it.
        thresholds: those that decide the row; None if all of its tokens are high.
        rows: where its tokens are among those of `PromptPlan`.
        closed: of a chunk's first part, the chain as it is read back, or None.
        waited: likewise what has waited of the segment.
        stored: the row that is complete with it as it is read back, if tokens of the chunk follow.
    """

    slot: int
    chain: tuple[int, ...]
    starts: tuple[int, ...]
    first: int
    stop: int
    end: int
    row_end: int
    target: int | None
    is_last: bool
    thresholds: Thresholds | None
    rows: slice
    closed: RowPlaces | None
    waited: RowPlaces | None
    stored: RowPlaces | None

    @property
    def start(self) -> int:
        """Index of the first token of the segment."""
        return self.starts[-1]

    @property
    def length(self) -> int:
        """Tokens of the segment so far."""
        return self.stop - self.start

    @property
    def num_tokens(self) -> int:
        """Tokens of the part."""
        return self.stop - self.first

    @property
    def has_waited(self) -> bool:
        """Whether tokens of the segment came in earlier chunks."""
        return self.first > self.start

    def num_early_queries(self, most: int) -> int:
        """Of the last `most` queries of the segment so far, those that came in earlier chunks."""
        return max(0, self.first - max(self.start, self.stop - most))

    def queries(self, most: int) -> slice:
        """The others of them, among the tokens of `PromptPlan`."""
        return slice(max(self.rows.start, self.rows.stop - most), self.rows.stop)


@dataclass(frozen=True)
class Scoring:
    """What sorts the N tokens of complete rows into tiers.

    Attributes:
        queries: where the rows' scoring queries are among the tokens of their wave; None where some of
            them came in earlier chunks.
        query_starts: [R + 1] int32, where each row's scoring queries start.
        key_starts: [R + 1] int32, where the tokens of each request start, those of its chain first.
        max_queries: most of one row.
        page_tokens: [R] int32, see `reference.decide_rows`.
        bounds: [R, 2] float32, bounds of the means, where the policy just compares them; else None.
        num_scored: [N] float32, scoring queries that saw each token, where it does not; else None.
    """

    queries: slice | Tensor | None
    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    page_tokens: Tensor
    bounds: Tensor | None
    num_scored: Tensor | None

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        starts: Mapping[int, int],
        policy: Policy,
        layout: PageLayout,
        place: Place,
    ) -> "Scoring":
        """Put together what the rule asks of parts that complete their rows.

        `starts` is where each request's tokens start in the wave.
        """
        most = policy.scored_queries
        stops = [starts[p.slot] + p.num_tokens for p in parts]
        last = [slice(e - min(p.num_tokens, most), e) for p, e in zip(parts, stops, strict=True)]
        lengths, ends = [p.length for p in parts], [p.stop for p in parts]
        num_queries = [min(length, most) for length in lengths]
        # A closed row grows no more: what room its last high page has is filled
        per_page = layout.high.tokens_per_page if layout.low is not None else 0
        page_tokens = [per_page * (p.target != p.slot) for p in parts]
        bounds = num_scored = None
        if policy.by_token:
            alphas = [(t.alpha_high, t.alpha_low) for p in parts if (t := p.thresholds)]
            bounds = place(
                threshold(torch.tensor(alphas), torch.tensor(ends)[:, None]), torch.float32
            )
        else:
            from_end = [np.arange(length, 0, -1) for length in lengths]
            num_scored = place(np.concatenate(from_end).clip(max=most), torch.float32)
        return cls(
            None if any(p.num_early_queries(most) for p in parts) else spans_of(last, place),
            place([0, *accumulate(num_queries)]),
            place([0, *accumulate(ends)]),
            max(num_queries),
            place(page_tokens),
            bounds,
            num_scored,
        )


def _centring(parts: Sequence[Part], window: int, place: Place) -> Tensor:
    """[R, 4] int32: how the centres of complete rows follow from their keys, see `centre_rows`.

    A request's first token, which attention treats unlike others, does not count. A row that is shorter
    than the window takes the centre of the row before it. An open row that begins empty has that of the
    prompt's last row.
    """
    return place(
        [
            (
                p.target,
                p.start == 0 and p.length > 1,
                p.chain[-1] if p.chain and p.length < window else -1,
                p.slot if p.is_last and p.target != p.slot else -1,
            )
            for p in parts
        ]
    )


@dataclass(frozen=True)
class Completion:
    """Rows of a wave that are complete, and decided in the same way.

    Attributes:
        parts: the parts that complete them.
        rows: where their tokens are among those of `PromptPlan`; None where some came in earlier chunks.
        packing: their tokens, earlier chunks included.
        waited: [.] int32, open rows whose tokens have waited and are now elsewhere; None: none has.
        centring: [R, 4] int32, see `reference.centre_rows`; None where keys are stored as they are.
        scoring: None where all tokens are high.
    """

    parts: tuple[Part, ...]
    rows: slice | Tensor | None
    packing: Packing
    waited: Tensor | None
    centring: Tensor | None
    scoring: Scoring | None

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        starts: Mapping[int, int],
        policy: Policy | None,
        state: PoolState,
        place: Place,
    ) -> "Completion":
        """Rows that a policy decides, or that are all high."""
        targets = [p.target for p in parts if p.target is not None]
        waited = [p.slot for p in parts if p.has_waited]
        lengths = [p.length for p in parts]
        return cls(
            tuple(parts),
            None if waited else spans_of([p.rows for p in parts], place),
            Packing.of(targets, [p.start for p in parts], lengths, place),
            place(waited) if waited else None,
            _centring(parts, state.window, place) if state.centre_dim else None,
            None if policy is None else Scoring.of(parts, starts, policy, state.layout, place),
        )


@dataclass(frozen=True)
class Waiting:
    """Tokens that have to wait for the rest of their segment.

    Attributes:
        parts: their parts.
        rows: where they are among the tokens of `PromptPlan`.
        packing: the same as they are stored.
    """

    parts: tuple[Part, ...]
    rows: slice | Tensor
    packing: Packing

    @classmethod
    def of(cls, parts: Sequence[Part], place: Place) -> "Waiting | None":
        """None if there are no parts."""
        if not parts:
            return None
        firsts, lengths = [p.first for p in parts], [p.num_tokens for p in parts]
        packing = Packing.of([p.slot for p in parts], firsts, lengths, place)
        return cls(tuple(parts), spans_of([p.rows for p in parts], place), packing)


@dataclass(frozen=True)
class Wave:
    """Parts that are attended to together: at most one of each request.

    Attributes:
        parts: the parts.
        rows: rows of their tokens among those of `PromptPlan`.
        spans: the parts as attention sees them where nothing is dropped.
        waiting: tokens that have to wait; None if there are none.
        complete: rows that are complete.
    """

    parts: tuple[Part, ...]
    rows: slice | Tensor
    spans: Spans
    waiting: Waiting | None
    complete: tuple[Completion, ...]

    @classmethod
    def of(cls, parts: Sequence[Part], policy: Policy, state: PoolState, place: Place) -> "Wave":
        """Put together what all layers ask of some parts."""
        lengths = [p.num_tokens for p in parts]
        starts = {
            p.slot: start for p, start in zip(parts, accumulate(lengths, initial=0), strict=False)
        }
        waiting = [p for p in parts if p.target is None]
        decided = [p for p in parts if p.target is not None and p.thresholds is not None]
        high = [p for p in parts if p.target is not None and p.thresholds is None]
        return cls(
            tuple(parts),
            spans_of([p.rows for p in parts], place),
            Spans.of(lengths, [p.stop for p in parts], place),
            Waiting.of(waiting, place),
            tuple(
                Completion.of(some, starts, policy if some is decided else None, state, place)
                for some in (decided, high)
                if some
            ),
        )


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
