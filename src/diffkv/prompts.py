"""The way of prompts into the cache: exact attention, then tiers by the attention received.

A prompt is decided segment by segment. What is complete becomes a closed row, and later segments read
it as it is stored, so that it makes no difference who computed it, and when. Tokens of a segment that is
not complete wait for the rest of it as the model made them, in pages of the open row; so do the queries
that score it.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from diffkv.chains import Chains
from diffkv.layout import PageLayout
from diffkv.ops import Ops
from diffkv.packing import joined
from diffkv.policies import Policy
from diffkv.policy import HIGH, SCORED_QUERIES, fill_pages
from diffkv.prefill import Prefill, Spans
from diffkv.reading import Seen
from diffkv.rotator import Rotator
from diffkv.state import PoolState
from diffkv.steps import Completion, Part, PromptChunk, PromptPlan, Scoring, Wave
from diffkv.value_range import ValueRange

__all__ = ["PromptPath"]


def _fewest_bits(layout: PageLayout) -> tuple[int, int]:
    """Bits of keys and of values, in the tiers that have fewest."""
    formats = [tier.format for tier in layout.tiers]
    return min(f.k_bits for f in formats), min(f.v_bits for f in formats)


class PromptPath:
    """Attends among prompts, decides them and stores them, for every layer of one model.

    Its arguments are those of `DiffKVCache`, but for `rotator`, which rotates vectors on their way.

    Attributes:
        chains: the rows of every request, which begins there.
    """

    def __init__(
        self,
        state: PoolState,
        ops: Ops,
        scale: float,
        policy: Policy,
        prefill: Prefill,
        rotator: Rotator,
    ) -> None:
        self._state = state
        self.exact = state.exact()
        self._ops = ops
        self._scale = scale
        self._policy = policy
        self._prefill = prefill
        self._rotator = rotator
        self._device = state.pages.device
        self.chains = Chains(state, policy)
        self._queries: dict[tuple[int, int], Tensor] = {}
        bits = _fewest_bits(state.layout)
        self.value_range = ValueRange(state.num_layers, self._device, *bits, bool(state.centre_dim))

    def __contains__(self, slot: int) -> bool:
        """Whether a slot has a request."""
        return slot in self.chains

    def end(self, slot: int) -> None:
        """Forget a request."""
        self.chains.end(slot)
        for layer in range(self._state.num_layers):
            self._queries.pop((slot, layer), None)

    def compresses(self, chunk: PromptChunk) -> bool:
        """Whether a prompt is complete with this chunk, and its tokens are sorted into tiers."""
        return chunk.is_last and self.chains.decides(chunk.slot)

    def plan(self, chunks: Sequence[PromptChunk]) -> PromptPlan:
        """Plan some chunks for all layers, see `Chains.plan`."""
        return self.chains.plan(chunks)

    def attend(
        self,
        layer: int,
        plan: PromptPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
    ) -> None:
        """Attend exactly, then store. Only what has been stored before is attended to as rotated.

        Args:
            layer: number of the layer.
            plan: the plan of this step's chunks.
            query: [num_rows, num_q_heads, head_dim], packed batch.
            key: [num_rows, num_kv_heads, head_dim].
            value: [num_rows, num_kv_heads, head_dim].
            output: [num_rows, num_q_heads, head_dim], written for the prompts' rows.
        """
        rows = plan.rows
        vectors = query[rows], key[rows], value[rows]
        stored = self._rotator.rotate(vectors[1]), self._rotator.rotate(vectors[2])
        self.value_range.look(layer, *stored)
        out = output[rows]
        seen: dict[int, Seen] = {}
        for wave in plan.waves:
            self._read(layer, wave, seen, stored)
            self._attend_wave(wave, seen, vectors, out)
            for completion in wave.complete:
                self._complete(layer, completion, seen, vectors[0], stored)
            self._wait(layer, wave, vectors[0], stored)
            for part in wave.parts:
                if part.end > part.stop:
                    self._seen(layer, part, seen).close(part)
        if not isinstance(rows, slice):
            output[rows] = out

    def _read(
        self, layer: int, wave: Wave, seen: dict[int, Seen], stored: tuple[Tensor, Tensor]
    ) -> None:
        """Read what parts see of earlier tokens, and add their own."""
        for part in wave.parts:
            if part.first:
                earlier = self._seen(layer, part, seen)
                earlier.add(part, stored[0][part.rows], stored[1][part.rows])

    def _seen(self, layer: int, part: Part, seen: dict[int, Seen]) -> Seen:
        """What a request's parts see in a layer; made by the first of them that asks."""
        if part.slot not in seen:
            seen[part.slot] = Seen(self._state, self.exact, self._ops, layer, part)
        return seen[part.slot]

    def _may_drop(self, part: Part) -> bool:
        """Whether heads may keep different tokens of a request's closed rows."""
        if not part.chain or part.thresholds is None:
            return False
        return part.thresholds.drops or not self._policy.by_token

    def _attend_wave(
        self,
        wave: Wave,
        seen: dict[int, Seen],
        vectors: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
    ) -> None:
        if not any(part.first for part in wave.parts):
            out, rows = output[wave.rows], wave.rows
            query, key, value = (x[rows] for x in vectors)
            self._prefill(query, key, value, wave.spans, self._scale, out)
            if not isinstance(rows, slice):
                output[rows] = out
            return
        if any(self._may_drop(part) for part in wave.parts):
            self._attend_by_head(wave, seen, vectors, output)
            return
        queries, keys, values = [], [], []
        for part in wave.parts:
            query, key, value = (x[part.rows] for x in vectors)
            if part.first:
                query = self._rotator.rotate(query)
                key, value = (x[: part.stop] for x in (seen[part.slot].key, seen[part.slot].value))
            queries.append(query)
            keys.append(key)
            values.append(value)
        packed = joined(queries)
        out = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
        self._prefill(packed, joined(keys), joined(values), wave.spans, self._scale, out)
        for part, attended in zip(wave.parts, out.split(wave.spans.num_queries), strict=True):
            if part.first:
                self._rotator.unrotate(attended)
            output[part.rows] = attended

    def _attend_by_head(
        self,
        wave: Wave,
        seen: dict[int, Seen],
        vectors: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
    ) -> None:
        """Attend where heads may keep different tokens: one part after the other."""
        for part in wave.parts:
            query, key, value = (x[part.rows] for x in vectors)
            if not part.first:
                alone = Spans.of([part.stop], [part.stop], self._device)
                self._prefill(query, key, value, alone, self._scale, output[part.rows])
                continue
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            packed = seen[part.slot].by_head(part)
            packed.attend(self._prefill, self._rotator.rotate(query), self._scale, out)
            self._rotator.unrotate(out)
            output[part.rows] = out

    def _complete(
        self,
        layer: int,
        completion: Completion,
        seen: dict[int, Seen],
        query: Tensor,
        stored: tuple[Tensor, Tensor],
    ) -> None:
        """Decide rows and store them, in place of what has waited."""
        own = [self._own(part, seen, stored) for part in completion.parts]
        key, value = joined([k for k, _ in own]), joined([v for _, v in own])
        packing, state = completion.packing, self._state
        if completion.scoring is None:
            sums, tiers = self._all_high(len(key))
        else:
            queries = [self._scoring_queries(layer, part, query) for part in completion.parts]
            sums, tiers = self._score(completion, completion.scoring, seen, stored, queries)
        if completion.waited is not None:
            self._ops.release(state, completion.waited, layer)
        if completion.centring is not None:
            completion.centring.centre(key, state.centres[:, layer])
        self._ops.store_prompt(state, layer, packing.tokens(key, value), tiers, sums)

    def _all_high(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Sums and tiers of tokens that nothing decides: [num_kv_heads, num_tokens] each."""
        shape = (self._state.num_kv_heads, num_tokens)
        sums = torch.zeros(shape, dtype=torch.float32, device=self._device)
        return sums, torch.full(shape, HIGH, dtype=torch.int8, device=self._device)

    @staticmethod
    def _own(
        part: Part, seen: dict[int, Seen], stored: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of a part's row."""
        if not part.first:
            return stored[0][part.rows], stored[1][part.rows]
        row = slice(part.start, part.stop)
        return seen[part.slot].key[row], seen[part.slot].value[row]

    def _score(
        self,
        completion: Completion,
        scoring: Scoring,
        seen: dict[int, Seen],
        stored: tuple[Tensor, Tensor],
        queries: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Sums and tiers of complete rows: [num_kv_heads, N] each."""
        parts, policy = completion.parts, self._policy
        if any(part.first and self._may_drop(part) for part in parts):
            sums = torch.cat(
                [
                    self._sums_by_head(part, seen, stored, q)
                    for part, q in zip(parts, queries, strict=True)
                ],
                1,
            )
        else:
            keys = [seen[p.slot].key[: p.stop] if p.first else stored[0][p.rows] for p in parts]
            starts = scoring.query_starts, scoring.key_starts, scoring.own_starts
            sums = self._ops.significance(
                joined(queries),
                joined(keys),
                *starts,
                scoring.num_own,
                self._scale,
                scoring.max_queries,
            )
        means = sums / scoring.num_scored
        if policy.scored_queries != SCORED_QUERIES:
            # Decode divides by `num_seen`, whoever has scored the prompt
            sums = means * scoring.num_seen
        if scoring.bounds is not None:
            tiers = scoring.bounds.tiers(means)
        else:
            tiers = self._tiers(parts, means, seen, stored)
        if self._state.layout.low is not None:
            firsts = accumulate((part.length for part in parts), initial=0)
            for part, start in zip(parts, firsts, strict=False):
                if part.target != part.slot:
                    row = slice(start, start + part.length)
                    fill_pages(
                        tiers[:, row], means[:, row], self._state.layout.high.tokens_per_page
                    )
        return sums, tiers

    def _tiers(
        self,
        parts: Sequence[Part],
        means: Tensor,
        seen: dict[int, Seen],
        stored: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Tiers by a policy that looks at one row at a time."""
        lengths = [part.length for part in parts]
        keys = [self._own(part, seen, stored)[0] for part in parts]
        tiers = [
            self._policy.decide(
                mean, key, p.thresholds.of_part(p.length, p.stop), self._state.window
            )
            for p, mean, key in zip(parts, means.split(lengths, 1), keys, strict=True)
            if p.thresholds is not None
        ]
        return torch.cat(tiers, 1)

    def _sums_by_head(
        self, part: Part, seen: dict[int, Seen], stored: tuple[Tensor, Tensor], query: Tensor
    ) -> Tensor:
        most = self._policy.scored_queries
        if part.first:
            packed = seen[part.slot].by_head(part)
            return packed.significance(self._ops, part, query, self._scale, most)
        alone = Spans.of([len(query)], [part.stop], self._device)
        starts = alone.query_starts, alone.key_starts, alone.key_starts
        key = stored[0][part.rows]
        return self._ops.significance(query, key, *starts, len(key), self._scale, len(query))

    def _scoring_queries(self, layer: int, part: Part, query: Tensor) -> Tensor:
        """The rotated queries that score a complete row, those of earlier chunks included."""
        rows = slice(
            max(part.rows.start, part.rows.stop - self._policy.scored_queries), part.rows.stop
        )
        earlier = self._queries.pop((part.slot, layer), query[:0])
        return torch.cat([earlier, self._rotator.rotate(query[rows])])

    def _wait(self, layer: int, wave: Wave, query: Tensor, stored: tuple[Tensor, Tensor]) -> None:
        """Keep tokens for the rest of their segment, and those queries that will score it."""
        if wave.waiting is None:
            return
        parts = [part for part in wave.parts if part.target is None]
        key, value = (joined([x[part.rows] for part in parts]) for x in stored)
        sums, tiers = self._all_high(len(key))
        self._ops.store_prompt(self.exact, layer, wave.waiting.tokens(key, value), tiers, sums)
        for part in parts:
            num = part.stop - max(part.first, part.row_end - self._policy.scored_queries)
            if part.thresholds is None or num <= 0:
                continue
            latest = self._rotator.rotate(query[part.rows.stop - num : part.rows.stop])
            place = part.slot, layer
            self._queries[place] = torch.cat([self._queries.get(place, query[:0]), latest])
