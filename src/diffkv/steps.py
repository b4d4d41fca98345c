"""One forward pass over a cache: chunks of prompts, and the places of generated tokens.

All that the layers of a step have in common is put on the device once, without waiting for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from diffkv.policies import Policy
from diffkv.policy import SCORED_QUERIES, Thresholds, TokenBounds, threshold
from diffkv.prefill import Spans
from diffkv.state import DecodePlan, PromptTokens

__all__ = [
    "Packing",
    "PromptChunk",
    "PromptPlan",
    "Scoring",
    "Step",
    "joined",
    "on_device",
    "spans_of",
]


@dataclass(frozen=True)
class PromptChunk:
    """Some tokens of one request's prompt, as a span of a packed batch.

    Attributes:
        slot: slot of the request.
        span: rows of the batch.
        num_stored: prompt tokens that came in earlier chunks.
        prompt_len: tokens of the whole prompt.
    """

    slot: int
    span: slice
    num_stored: int
    prompt_len: int

    @property
    def num_new(self) -> int:
        """Tokens of this chunk."""
        return int(self.span.stop - self.span.start)

    @property
    def end(self) -> int:
        """Prompt tokens that are in the cache after this chunk."""
        return self.num_stored + self.num_new

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete with this chunk."""
        return self.end == self.prompt_len


@dataclass(frozen=True)
class Packing:
    """Tokens of R chunks that are stored together, N in all, one chunk after the other.

    Attributes:
        chunks: the chunks.
        rows: rows of the chunks' new tokens among those of `PromptPlan`.
        slots: [R] int32.
        starts: [R + 1] int32, where each chunk's tokens start.
        positions: [N] int32, index of each token in its request.
    """

    chunks: tuple[PromptChunk, ...]
    rows: slice | Tensor
    slots: Tensor
    starts: Tensor
    positions: Tensor

    def tokens(self, key: Tensor, value: Tensor) -> PromptTokens:
        """The argument of `store_prompt`: key and value are [N, num_kv_heads, head_dim]."""
        return PromptTokens(self.slots, self.starts, key, value, self.positions)


@dataclass(frozen=True)
class Scoring:
    """Prompts that are complete, and what sorts their N tokens into tiers.

    Attributes:
        packing: whole prompts, earlier chunks included.
        stored_slots: [.] int32, of the prompts that have earlier chunks; None if there are none.
        query_rows: rows of the scoring queries among the tokens of `PromptPlan`; None where some came
            in earlier chunks.
        query_starts: [R + 1] int32, where each prompt's scoring queries start.
        max_queries: most of one prompt.
        num_scored: [N] float32, scoring queries that saw each token.
        num_seen: [N] float32, by how many the rule divides when it decides for generated tokens.
        bounds: bounds of the means, where the policy just compares them.
    """

    packing: Packing
    stored_slots: Tensor | None
    query_rows: slice | Tensor | None
    query_starts: Tensor
    max_queries: int
    num_scored: Tensor
    num_seen: Tensor
    bounds: TokenBounds | None


@dataclass(frozen=True)
class PromptPlan:
    """The chunks of prompts of a step; their tokens are packed one chunk after the other.

    Attributes:
        chunks: the chunks.
        rows: rows of their tokens in the step's batch.
        spans: the chunks as attention sees them, with all tokens stored before.
        undecided: the chunks whose tokens are kept high; None if there are none.
        complete: the prompts that are decided in this step; None if there are none.
    """

    chunks: tuple[PromptChunk, ...]
    rows: slice | Tensor
    spans: Spans
    undecided: Packing | None
    complete: Scoring | None

    @property
    def parts(self) -> list[tuple[PromptChunk, slice]]:
        """Each chunk, and where its tokens are."""
        ends = list(accumulate(self.spans.num_queries))
        return [(c, slice(end - c.num_new, end)) for c, end in zip(self.chunks, ends, strict=True)]

    @classmethod
    def of(
        cls,
        chunks: Sequence[PromptChunk],
        decided: Sequence[Thresholds | None],
        policy: Policy,
        window: int,
        device: torch.device,
    ) -> "PromptPlan":
        """Put together what all layers ask of some chunks.

        Args:
            chunks: in any order of rows.
            decided: for each chunk, the thresholds that decide the prompt; None where this chunk does
                not complete it, or nothing is to be decided.
            policy: policy of the cache.
            window: recent tokens that stay high.
            device: device of the cache.
        """
        spans = Spans.of([c.num_new for c in chunks], [c.end for c in chunks], device)
        slots = [c.slot for c in chunks]
        starts = dict(zip(slots, accumulate([0, *spans.num_queries]), strict=False))
        pairs = list(zip(chunks, decided, strict=True))
        early = [c for c, t in pairs if t is None]
        complete = [(c, t) for c, t in pairs if t is not None]
        return cls(
            tuple(chunks),
            spans_of([c.span for c in chunks], device),
            spans,
            _packing(early, starts, device, whole=False) if early else None,
            _scoring(complete, starts, policy, window, device) if complete else None,
        )


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


def _packing(
    chunks: Sequence[PromptChunk],
    starts: dict[int, int],
    device: torch.device,
    whole: bool,
) -> Packing:
    """Pack the chunks' own tokens, or all tokens up to the chunks' ends."""
    lengths = [c.end if whole else c.num_new for c in chunks]
    firsts = [0 if whole else c.num_stored for c in chunks]
    packed_starts = [0, *accumulate(lengths)]
    offsets = [first - start for first, start in zip(firsts, packed_starts, strict=False)]
    each = torch.arange(packed_starts[-1], dtype=torch.int32, device=device)
    return Packing(
        tuple(chunks),
        spans_of([slice(starts[c.slot], starts[c.slot] + c.num_new) for c in chunks], device),
        on_device([c.slot for c in chunks], torch.int32, device),
        on_device(packed_starts, torch.int32, device),
        each + _spread(offsets, torch.int32, lengths, device),
    )


def _scoring(
    prompts: Sequence[tuple[PromptChunk, Thresholds]],
    starts: dict[int, int],
    policy: Policy,
    window: int,
    device: torch.device,
) -> Scoring:
    chunks = [c for c, _ in prompts]
    packing = _packing(chunks, starts, device, whole=True)
    lengths = [c.prompt_len for c in chunks]
    num_queries = [min(length, policy.scored_queries) for length in lengths]
    query_rows = None
    if all(n <= c.num_new for c, n in zip(chunks, num_queries, strict=True)):
        ends = [starts[c.slot] + c.num_new for c in chunks]
        query_rows = spans_of(
            [slice(end - n, end) for end, n in zip(ends, num_queries, strict=True)], device
        )
    stored = [c.slot for c in chunks if c.num_stored]
    from_end = _spread(lengths, torch.int32, lengths, device) - packing.positions
    bounds = None
    if policy.by_token:
        least = [
            threshold(torch.tensor(alphas), torch.tensor(lengths)).tolist()
            for alphas in zip(*((t.alpha_high, t.alpha_low) for _, t in prompts), strict=True)
        ]
        high, low = (_spread(values, torch.float32, lengths, device) for values in least)
        bounds = TokenBounds(high, low, from_end <= window)
    return Scoring(
        packing,
        on_device(stored, torch.int32, device) if stored else None,
        query_rows,
        on_device([0, *accumulate(num_queries)], torch.int32, device),
        max(num_queries),
        from_end.clamp(max=policy.scored_queries).float(),
        from_end.clamp(max=SCORED_QUERIES).float(),
        bounds,
    )


def _spread(
    values: Sequence[float], dtype: torch.dtype, lengths: Sequence[int], device: torch.device
) -> Tensor:
    """[sum(lengths)]: each value as often as its length says."""
    counts = on_device(lengths, torch.int64, device)
    each = on_device(values, dtype, device)
    return torch.repeat_interleave(each, counts, output_size=sum(lengths))


def spans_of(spans: Sequence[slice], device: torch.device) -> slice | Tensor:
    """The rows of some spans, one span after the other: a slice where they are neighbours."""
    if all(a.stop == b.start for a, b in pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    lengths = [span.stop - span.start for span in spans]
    starts = [0, *accumulate(lengths)]
    offsets = [span.start - start for span, start in zip(spans, starts, strict=False)]
    each = torch.arange(starts[-1], device=device)
    return each + _spread(offsets, torch.int64, lengths, device)


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[len(values)], copied without waiting for the device."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other along the first dimension."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
