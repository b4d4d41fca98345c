"""One forward pass over a cache: chunks of prompts, and the places of generated tokens.

All that the layers of a step have in common is put on the device once, without waiting for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from diffkv.packing import Packing, RowPlaces, on_device, spans_of, spread
from diffkv.policies import Policy
from diffkv.policy import SCORED_QUERIES, Thresholds, TokenBounds, threshold
from diffkv.prefill import Spans
from diffkv.state import DecodePlan

__all__ = [
    "Completion",
    "Part",
    "PromptChunk",
    "PromptPlan",
    "Scoring",
    "Step",
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
        closed: the chain as it is read back, or None.
        waited: likewise what has waited of the segment.
        stored: likewise the row that is complete with it.
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
    def has_waited(self) -> bool:
        """Whether tokens of the segment came in earlier chunks."""
        return self.first > self.start


@dataclass(frozen=True)
class Scoring:
    """What sorts the N tokens of complete rows into tiers.

    Attributes:
        query_starts: [R + 1] int32, where each row's scoring queries start.
        key_starts: [R + 1] int32, where the tokens of each request start, those of its chain first.
        own_starts: [R + 1] int32, where the rows' tokens start among the N.
        num_own: N.
        max_queries: most of one row.
        num_scored: [N] float32, scoring queries that saw each token.
        num_seen: [N] float32, by how many the rule divides when it decides for generated tokens.
        bounds: bounds of the means, where the policy just compares them.
    """

    query_starts: Tensor
    key_starts: Tensor
    own_starts: Tensor
    num_own: int
    max_queries: int
    num_scored: Tensor
    num_seen: Tensor
    bounds: TokenBounds | None

    @classmethod
    def of(
        cls, parts: Sequence[Part], policy: Policy, window: int, device: torch.device
    ) -> "Scoring":
        """Put together what the rule asks of parts that complete their rows."""
        lengths, ends = [p.length for p in parts], [p.stop for p in parts]
        num_queries = [min(length, policy.scored_queries) for length in lengths]
        each = torch.arange(sum(lengths), dtype=torch.int32, device=device)
        from_end = spread(list(accumulate(lengths)), torch.int32, lengths, device) - each
        bounds = None
        if policy.by_token:
            alphas = [(t.alpha_high, t.alpha_low) for p in parts if (t := p.thresholds)]
            least = [
                threshold(torch.tensor(values), torch.tensor(ends)).tolist()
                for values in zip(*alphas, strict=True)
            ]
            high, low = (spread(values, torch.float32, lengths, device) for values in least)
            bounds = TokenBounds(high, low, from_end <= window)
        return cls(
            on_device([0, *accumulate(num_queries)], torch.int32, device),
            on_device([0, *accumulate(ends)], torch.int32, device),
            on_device([0, *accumulate(lengths)], torch.int32, device),
            sum(lengths),
            max(num_queries),
            from_end.clamp(max=policy.scored_queries).float(),
            from_end.clamp(max=SCORED_QUERIES).float(),
            bounds,
        )


@dataclass(frozen=True)
class Centring:
    """How the centres of complete rows follow from their keys.

    Attributes:
        slots: [R] int64.
        lengths: [R] int64, tokens of each row.
        starts: [R] int64, where they start.
        left_out: [R, 1, 1] float32: 1 where a row's first token is a request's first, which attention
            treats unlike others, so that it does not count; else 0.
        copied: [R] int64: the closed row before one that is too short for a centre of its own, or -1.
        copies: whether there is such a row.
        heirs: [2, .] int64: open rows that begin empty, and those from which they have their centres.
    """

    slots: Tensor
    lengths: Tensor
    starts: Tensor
    left_out: Tensor
    copied: Tensor
    copies: bool
    heirs: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], window: int, device: torch.device) -> "Centring":
        """Put together what the centres of complete rows are made from."""
        lengths = [p.length for p in parts]
        copied = [p.chain[-1] if p.chain and p.length < window else -1 for p in parts]
        left_out = [float(p.start == 0 and p.length > 1) for p in parts]
        heirs = [(p.slot, p.target or 0) for p in parts if p.is_last and p.target != p.slot]
        return cls(
            on_device([p.target or 0 for p in parts], torch.int64, device),
            on_device(lengths, torch.int64, device),
            on_device([0, *accumulate(lengths)][:-1], torch.int64, device),
            on_device(left_out, torch.float32, device)[:, None, None],
            on_device(copied, torch.int64, device),
            max(copied) >= 0,
            on_device(heirs, torch.int64, device).view(-1, 2).T,
        )

    def centre(self, key: Tensor, centres: Tensor) -> None:
        """Note the mean key of each row as its centre.

        Args:
            key: [N, num_kv_heads, head_dim], the rows' keys as they would be stored.
            centres: [num_slots, num_kv_heads, head_dim], of all rows in one layer; changes.
        """
        flat = key.flatten(1).float()
        sums = torch.segment_reduce(flat, "sum", lengths=self.lengths, axis=0, unsafe=True)
        sums = sums.view(-1, *key.shape[1:]) - key[self.starts].float() * self.left_out
        means = sums / (self.lengths[:, None, None] - self.left_out)
        if self.copies:
            before = centres[self.copied.clamp(min=0)].float()
            means = torch.where((self.copied >= 0)[:, None, None], before, means)
        centres[self.slots] = means.to(centres.dtype)
        if self.heirs.numel():
            centres[self.heirs[0]] = centres[self.heirs[1]]


@dataclass(frozen=True)
class Completion:
    """Rows of a wave that are complete, and decided in the same way.

    Attributes:
        parts: the parts that complete them.
        packing: their tokens, earlier chunks included.
        waited: [.] int32, open rows whose tokens have waited and are now elsewhere; None: none has.
        centring: None where keys are stored as they are.
        scoring: None where all tokens are high.
    """

    parts: tuple[Part, ...]
    packing: Packing
    waited: Tensor | None
    centring: Centring | None
    scoring: Scoring | None


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
    waiting: Packing | None
    complete: tuple[Completion, ...]

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        policy: Policy,
        window: int,
        centred: bool,
        device: torch.device,
    ) -> "Wave":
        """Put together what all layers ask of some parts."""
        waiting = [p for p in parts if p.target is None]
        decided = [p for p in parts if p.target is not None and p.thresholds is not None]
        high = [p for p in parts if p.target is not None and p.thresholds is None]
        packing = None
        if waiting:
            lengths = [p.stop - p.first for p in waiting]
            packing = Packing.of(
                [p.slot for p in waiting], [p.first for p in waiting], lengths, device
            )
        return cls(
            tuple(parts),
            spans_of([p.rows for p in parts], device),
            Spans.of([p.stop - p.first for p in parts], [p.stop for p in parts], device),
            packing,
            tuple(
                _completion(some, policy if some is decided else None, window, centred, device)
                for some in (decided, high)
                if some
            ),
        )


def _completion(
    parts: Sequence[Part], policy: Policy | None, window: int, centred: bool, device: torch.device
) -> Completion:
    """Rows that a policy decides, or that are all high."""
    targets = [p.target for p in parts if p.target is not None]
    waited = [p.slot for p in parts if p.has_waited]
    return Completion(
        tuple(parts),
        Packing.of(targets, [p.start for p in parts], [p.length for p in parts], device),
        on_device(waited, torch.int32, device) if waited else None,
        Centring.of(parts, window, device) if centred else None,
        Scoring.of(parts, policy, window, device) if policy is not None else None,
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


@dataclass(frozen=True)
class Step:
    """One forward pass over the cache; the same for every layer.

    Attributes:
        prompts: chunks of prompts; None if there are none.
        decode_rows: [R] int64, rows of the batch that are generated tokens, or a slice of them.
        decode: places of those tokens; None if there are none.
    """

    prompts: PromptPlan | None
    decode_rows: slice | Tensor
    decode: DecodePlan | None
