"""The prompts of one forward pass, part by part: a segment reads the ones before it as they are stored.

All that the layers of a step have in common is put on the device once, without waiting for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from diffkv.layout import PageLayout
from diffkv.packing import Packing, RowPlaces, spans_of
from diffkv.policies import Policy
from diffkv.policy import Thresholds, threshold
from diffkv.prefill import Spans
from diffkv.state import PoolState
from diffkv.uploads import Place

__all__ = ["Completion", "Part", "Scoring", "Sight", "Waiting", "Wave"]

GAP_TOKENS = 128
"""Tokens between beginnings are attended to in prompts of so many, since each takes longer the more."""


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
        stored: the row that is complete with it as it is read back, if tokens of the chunk follow and
            the prompt did not begin with it.
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
class Sight:
    """What some requests see until the ends of their chunks, one request after the other.

    Attributes:
        parts: a part of each request.
        starts: where each request's tokens begin here; the last one is the number of all.
        closed: their closed rows as they are read back; None if there are none.
        waited: what has waited of each open row, likewise.
        own: where tokens that come with the chunks are among those of `PromptPlan`.
        places: where those are here.
    """

    parts: tuple[Part, ...]
    starts: tuple[int, ...]
    closed: RowPlaces | None
    waited: tuple[RowPlaces, ...]
    own: slice | Tensor
    places: slice | Tensor

    @classmethod
    def before(cls, parts: Sequence[Part], place: Place) -> "Sight":
        """Of requests that go on with these parts."""
        return cls._of(parts, [(p.chain, p.starts) for p in parts], [p.first for p in parts], place)

    @classmethod
    def after(cls, parts: Sequence[Part], place: Place) -> "Sight":
        """Of requests that began with these parts, each of which is now a row."""
        rows = [((p.target,), (p.start, p.stop)) for p in parts if p.target is not None]
        return cls._of(parts, rows, [p.stop for p in parts], place)

    @classmethod
    def _of(
        cls,
        parts: Sequence[Part],
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        firsts: Sequence[int],
        place: Place,
    ) -> "Sight":
        """With the rows of each and their bounds, and each one's first token of those that follow."""
        starts = (0, *accumulate(p.end for p in parts))
        slots, begins, end = list[int](), list[int](), 0
        waited, own, places = list[RowPlaces](), list[slice](), list[slice]()
        for p, (row_slots, bounds), first, at in zip(parts, rows, firsts, starts, strict=False):
            if row_slots:
                slots += row_slots
                begins += [at + bound for bound in bounds[:-1]]
                end = at + bounds[-1]
            if first > bounds[-1]:
                span = slice(at + bounds[-1], at + first)
                waited.append(RowPlaces(span, place([p.slot]), place([0])))
            own.append(slice(p.rows.start + first - p.first, p.rows.start + p.end - p.first))
            places.append(slice(at + first, at + p.end))
        return cls(
            tuple(parts),
            starts,
            RowPlaces.of(slots, begins, end, place),
            tuple(waited),
            spans_of(own, place),
            spans_of(places, place),
        )

    def is_all_of(self, parts: Sequence[Part]) -> bool:
        """Whether some parts see all of it, in the same order."""
        return [p.slot for p in parts] == [p.slot for p in self.parts] and all(
            p.stop == p.end for p in parts
        )


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
    """Parts that are attended to together, one of a request: beginnings of prompts, or others.

    Attributes:
        parts: the parts.
        rows: rows of their tokens among those of `PromptPlan`. What is between beginnings may be there
            too: a later wave attends to it again.
        spans: those rows as attention sees them where nothing is dropped.
        before: what requests see that go on with this wave; None if there are none.
        after: what requests see that began with it and go on; None if there are none.
        sees_all: whether the parts see all that their requests' `Sight` has.
        waiting: tokens that have to wait; None if there are none.
        complete: rows that are complete.
    """

    parts: tuple[Part, ...]
    rows: slice | Tensor
    spans: Spans
    before: Sight | None
    after: Sight | None
    sees_all: bool
    waiting: Waiting | None
    complete: tuple[Completion, ...]

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        seen: Sight | None,
        policy: Policy,
        state: PoolState,
        place: Place,
    ) -> "Wave":
        """Put together what all layers ask of some parts, of which earlier waves may have seen more."""
        rows, spans = _spans(parts, place)
        lengths, goes_on = [p.num_tokens for p in parts], parts[0].first > 0
        starts = list(accumulate(lengths, initial=0))
        if isinstance(rows, slice):
            starts = [p.rows.start - rows.start for p in parts]
        places = {p.slot: start for p, start in zip(parts, starts, strict=False)}
        before = Sight.before(parts, place) if goes_on and seen is None else None
        followed = [p for p in parts if p.end > p.stop and not goes_on]
        sight = before or seen
        decided = [p for p in parts if p.target is not None and p.thresholds is not None]
        high = [p for p in parts if p.target is not None and p.thresholds is None]
        return cls(
            tuple(parts),
            rows,
            spans,
            before,
            Sight.after(followed, place) if followed else None,
            sight is not None and sight.is_all_of(parts),
            Waiting.of([p for p in parts if p.target is None], place),
            tuple(
                Completion.of(some, places, policy if some is decided else None, state, place)
                for some in (decided, high)
                if some
            ),
        )


def _spans(parts: Sequence[Part], place: Place) -> tuple[slice | Tensor, Spans]:
    """Rows of some parts, and how attention sees them.

    Vectors of beginnings need not be put together first if tokens between them count as prompts of
    their own, short ones, which costs less unless they are many.
    """
    rows, lengths = [p.rows for p in parts], [p.num_tokens for p in parts]
    gaps = [after.start - before.stop for before, after in pairwise(rows)]
    if parts[0].first or min(gaps, default=0) < 0 or sum(gaps) > sum(lengths):
        return spans_of(rows, place), Spans.of(lengths, [p.stop for p in parts], place)
    filled = lengths[:1]
    for gap, length in zip(gaps, lengths[1:], strict=True):
        filled += [min(GAP_TOKENS, gap - first) for first in range(0, gap, GAP_TOKENS)]
        filled.append(length)
    return slice(rows[0].start, rows[-1].stop), Spans.of(filled, filled, place)
