"""The way of prompts into the cache: exact attention, then tiers by the attention received.

All of this is done with keys and values as the model made them. They are rotated on their way into the
pages of a row that is complete, and turned back when they are read.

A prompt is decided segment by segment. What is complete becomes a closed row, and later segments read
it as it is stored, so that it makes no difference who computed it, and when. Tokens of a segment that is
not complete wait for the rest of it as the model made them, in pages of the open row; so do the queries
that score it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkv.chains import Chains
from diffkv.layout import PageLayout
from diffkv.ops import Ops
from diffkv.packing import joined
from diffkv.policies import Policy
from diffkv.policy import HIGH
from diffkv.prefill import Prefill, Spans
from diffkv.reading import Reader, Seen
from diffkv.rotator import Rotator
from diffkv.state import PoolState
from diffkv.steps import PromptChunk, PromptPlan
from diffkv.uploads import at_once
from diffkv.value_range import ValueRange
from diffkv.waves import Completion, Part, Scoring, Sight, Waiting, Wave

__all__ = ["PromptPath"]

Vectors = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of a step's prompts in one layer: [num_tokens, heads, head_dim] each."""

Attended = tuple[Tensor, Tensor | None]
"""Queries, and the log-sum-exp of their scores where attention has said it, see `Prefill`."""


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
        self._reader = Reader(state, ops, rotator)
        self._ops = ops
        self._scale = scale
        self._policy = policy
        self._prefill = prefill
        self._rotator = rotator
        self._device = state.pages.device
        self.chains = Chains(state, policy)
        self._queries: dict[tuple[int, int], Tensor] = {}
        self._high = self._all_high(0)
        bits = _fewest_bits(state.layout)
        self.value_range = ValueRange(state.num_layers, self._device, *bits, bool(state.centre_dim))

    @property
    def exact(self) -> PoolState:
        """The pool for rows whose tokens wait."""
        return self._reader.exact

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
        """Attend exactly, then store.

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
        turned = self._turned(plan, vectors)
        in_place = isinstance(rows, slice)
        out = output[rows] if in_place else torch.empty_like(vectors[0])
        seen: dict[int, Seen] = {}
        for wave in plan.waves:
            if wave.before is not None:
                seen |= self._see(layer, wave.before, vectors)
            attended = self._attend_wave(wave, seen, vectors, out)
            for completion in wave.complete:
                self._complete(layer, wave, completion, seen, vectors, turned, attended)
            if wave.waiting is not None:
                self._wait(layer, wave.waiting, vectors)
            for part in wave.parts:
                if part.end == part.stop:
                    seen.pop(part.slot, None)
                elif part.slot in seen:
                    seen[part.slot].close(part)
            if wave.after is not None:
                seen |= self._see(layer, wave.after, vectors)
        if not in_place:
            output[rows] = out

    def _turned(self, plan: PromptPlan, vectors: Vectors) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the step as they are stored, for all of its waves at once."""
        _, key, value = vectors
        if not plan.completes_chunks:
            return None
        return self._rotator.rotate(key), self._rotator.rotate(value)

    def _see(self, layer: int, sight: Sight, vectors: Vectors) -> dict[int, Seen]:
        """Gather what some requests see."""
        drops = any(self._drops(part) for part in sight.parts)
        return Seen.of(self._reader, layer, sight, *vectors[1:], drops)

    def _drops(self, part: Part) -> bool:
        """Whether heads may keep different tokens of a request's rows."""
        if part.thresholds is None:
            return False
        return part.thresholds.drops or not self._policy.by_token

    def _may_differ(self, part: Part) -> bool:
        """Whether heads may see different tokens before a part's own row."""
        return bool(part.chain) and self._drops(part)

    def _attend_wave(
        self, wave: Wave, seen: dict[int, Seen], vectors: Vectors, output: Tensor
    ) -> Attended:
        query = vectors[0][wave.rows]
        if any(self._may_differ(part) for part in wave.parts):
            self._attend_by_head(wave, seen, vectors, output)
            return query, None
        key, value = self._context(wave, seen, vectors)
        in_place = isinstance(wave.rows, slice)
        out = output[wave.rows] if in_place else torch.empty_like(query)
        lse = self._prefill(query, key, value, wave.spans, self._scale, out)
        if not in_place:
            output[wave.rows] = out
        return query, lse

    @staticmethod
    def _context(wave: Wave, seen: dict[int, Seen], vectors: Vectors) -> tuple[Tensor, Tensor]:
        """Keys and values that the parts of a wave attend to, one part after the other."""
        if not wave.parts[0].first:
            return vectors[1][wave.rows], vectors[2][wave.rows]
        if wave.sees_all:
            return seen[wave.parts[0].slot].together
        pairs = [PromptPath._pair(part, seen, vectors) for part in wave.parts]
        return joined([key for key, _ in pairs]), joined([value for _, value in pairs])

    @staticmethod
    def _pair(part: Part, seen: dict[int, Seen], vectors: Vectors) -> tuple[Tensor, Tensor]:
        """Keys and values that a part attends to, where all heads see the same."""
        if not part.first:
            return vectors[1][part.rows], vectors[2][part.rows]
        return seen[part.slot].key[: part.stop], seen[part.slot].value[: part.stop]

    def _attend_by_head(
        self, wave: Wave, seen: dict[int, Seen], vectors: Vectors, output: Tensor
    ) -> None:
        """Attend where heads may keep different tokens: one part after the other."""
        for part in wave.parts:
            query, out = vectors[0][part.rows], output[part.rows]
            if self._may_differ(part):
                seen[part.slot].by_head(part).attend(self._prefill, query, self._scale, out)
            else:
                alone = Spans.of([len(query)], [part.stop], at_once(self._device))
                pair = self._pair(part, seen, vectors)
                self._prefill(query, *pair, alone, self._scale, out)

    def _complete(
        self,
        layer: int,
        wave: Wave,
        completion: Completion,
        seen: dict[int, Seen],
        vectors: Vectors,
        turned: tuple[Tensor, Tensor] | None,
        attended: Attended,
    ) -> None:
        """Decide rows and store them, in place of what has waited."""
        if completion.scoring is None:
            sums, tiers = self._undecided(completion.packing.num_tokens)
        else:
            queries = self._scoring_queries(
                layer, completion, completion.scoring, vectors, attended
            )
            sums = self._sums(wave, completion, completion.scoring, seen, vectors, queries)
            tiers = self._decide(completion, completion.scoring, sums, seen, vectors)
        state, packing = self._state, completion.packing
        if completion.waited is not None:
            self._ops.release(state, completion.waited, layer)
        if completion.rows is not None and turned is not None:
            key, value = (x[completion.rows] for x in turned)
        else:
            own = self._own(completion, seen, vectors)
            key, value = (self._rotator.rotate(x) for x in own)
        self.value_range.look(layer, key, value)
        if completion.centring is not None:
            self._ops.centre_rows(state, layer, completion.centring, packing.starts, key)
        self._ops.store_prompt(state, layer, packing.tokens(key, value), tiers, sums)

    def _all_high(self, num: int) -> tuple[Tensor, Tensor]:
        """Sums and tiers, [num] each, that say that all tokens are high."""
        sums = torch.zeros(num, dtype=torch.float32, device=self._device)
        return sums, torch.full(sums.shape, HIGH, dtype=torch.int8, device=self._device)

    def _undecided(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Those of tokens that nothing decides: [num_kv_heads, num_tokens] each, only to be read."""
        heads = self._state.num_kv_heads
        if self._high[0].numel() < heads * num_tokens:
            self._high = self._all_high(heads * num_tokens)
        sums, tiers = (each[: heads * num_tokens].view(heads, num_tokens) for each in self._high)
        return sums, tiers

    @staticmethod
    def _own(
        completion: Completion, seen: dict[int, Seen], vectors: Vectors
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of complete rows, one row after the other."""
        if completion.rows is not None:
            return vectors[1][completion.rows], vectors[2][completion.rows]
        pairs = []
        for part in completion.parts:
            if part.has_waited:
                row, request = slice(part.start, part.stop), seen[part.slot]
                pairs.append((request.key[row], request.value[row]))
            else:
                pairs.append((vectors[1][part.rows], vectors[2][part.rows]))
        return joined([key for key, _ in pairs]), joined([value for _, value in pairs])

    def _decide(
        self,
        completion: Completion,
        scoring: Scoring,
        sums: Tensor,
        seen: dict[int, Seen],
        vectors: Vectors,
    ) -> Tensor:
        """Tiers of complete rows, [num_kv_heads, N]; their sums become those that go with them."""
        if scoring.num_scored is None:
            tiers = torch.empty(sums.shape, dtype=torch.int8, device=self._device)
        else:
            key, _ = self._own(completion, seen, vectors)
            tiers = self._tiers(completion.parts, sums / scoring.num_scored, key)
        self._ops.decide_rows(
            sums,
            completion.packing.starts,
            scoring.bounds,
            scoring.page_tokens,
            self._state.window,
            self._policy.scored_queries,
            tiers,
        )
        return tiers

    def _sums(
        self,
        wave: Wave,
        completion: Completion,
        scoring: Scoring,
        seen: dict[int, Seen],
        vectors: Vectors,
        scored_by: Attended,
    ) -> Tensor:
        """Significance sums of complete rows: [num_kv_heads, N]."""
        parts, (queries, lse) = completion.parts, scored_by
        if any(self._may_differ(part) for part in parts):
            most = self._policy.scored_queries
            each = queries.split([min(part.length, most) for part in parts])
            sums = [self._sums_by_head(*of, seen, vectors) for of in zip(parts, each, strict=True)]
            return torch.cat(sums, 1)
        if wave.sees_all and len(parts) == len(wave.parts):
            keys, _ = seen[parts[0].slot].together
        elif completion.rows is not None and not parts[0].first:
            keys = vectors[1][completion.rows]
        else:
            keys = joined([self._pair(part, seen, vectors)[0] for part in parts])
        starts = scoring.query_starts, scoring.key_starts, completion.packing.starts
        num, most = completion.packing.num_tokens, scoring.max_queries
        return self._ops.significance(queries, keys, *starts, num, self._scale, most, lse)

    def _tiers(self, parts: Sequence[Part], means: Tensor, key: Tensor) -> Tensor:
        """Tiers by a policy that looks at one row at a time."""
        lengths = [part.length for part in parts]
        tiers = [
            self._policy.decide(
                mean, own, p.thresholds.of_part(p.length, p.stop), self._state.window
            )
            for p, mean, own in zip(parts, means.split(lengths, 1), key.split(lengths), strict=True)
            if p.thresholds is not None
        ]
        return torch.cat(tiers, 1)

    def _sums_by_head(
        self, part: Part, query: Tensor, seen: dict[int, Seen], vectors: Vectors
    ) -> Tensor:
        most, place = self._policy.scored_queries, at_once(self._device)
        if self._may_differ(part):
            packed = seen[part.slot].by_head(part)
            return packed.significance(self._ops, part, query, self._scale, most)
        alone = Spans.of([len(query)], [part.stop], place)
        starts = alone.query_starts, alone.key_starts, place([0, part.length])
        key, _ = self._pair(part, seen, vectors)
        return self._ops.significance(query, key, *starts, part.length, self._scale, len(query))

    def _scoring_queries(
        self,
        layer: int,
        completion: Completion,
        scoring: Scoring,
        vectors: Vectors,
        attended: Attended,
    ) -> Attended:
        """The queries that score complete rows, those of earlier chunks included."""
        if scoring.queries is not None:
            query, lse = attended
            return query[scoring.queries], None if lse is None else lse[:, scoring.queries]
        most, queries = self._policy.scored_queries, []
        for part in completion.parts:
            if part.num_early_queries(most):
                queries.append(self._queries.pop((part.slot, layer)))
            queries.append(vectors[0][part.queries(most)])
        return torch.cat(queries), None

    def _wait(self, layer: int, waiting: Waiting, vectors: Vectors) -> None:
        """Keep tokens for the rest of their segment, and those queries that will score it."""
        query, key, value = vectors
        sums, tiers = self._undecided(waiting.packing.num_tokens)
        tokens = waiting.packing.tokens(key[waiting.rows], value[waiting.rows])
        self._ops.store_prompt(self.exact, layer, tokens, tiers, sums)
        for part in waiting.parts:
            num = part.stop - max(part.first, part.row_end - self._policy.scored_queries)
            if part.thresholds is None or num <= 0:
                continue
            latest = query[part.rows.stop - num : part.rows.stop]
            place = part.slot, layer
            self._queries[place] = torch.cat([self._queries.get(place, query[:0]), latest])
