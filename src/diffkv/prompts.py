"""The way of prompts into the cache: exact attention, then tiers by the attention received.

Prompts may come in chunks: earlier chunks are stored all high, undecided; the last one decides for the
whole prompt, as if it had come at once. The queries that score a prompt wait for it here.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffkv import pool
from diffkv.layout import PageLayout
from diffkv.ops import Ops
from diffkv.policies import Policy
from diffkv.policy import HIGH, SCORED_QUERIES, Thresholds
from diffkv.prefill import Prefill
from diffkv.rotator import Rotator
from diffkv.state import PoolState, PromptTokens
from diffkv.steps import Packing, PromptChunk, PromptPlan, Scoring, joined, on_device
from diffkv.value_range import ValueRange

__all__ = ["PromptPath"]


def _fewest_bits(layout: PageLayout) -> tuple[int, int]:
    """Bits of keys and of values, in the tiers that have fewest."""
    formats = [tier.format for tier in layout.tiers]
    return min(f.k_bits for f in formats), min(f.v_bits for f in formats)


class PromptPath:
    """Attends among prompts, decides them and stores them, for every layer of one model.

    Its arguments are those of `DiffKVCache`, but for `rotator`, which rotates vectors on their way.
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
        self._ops = ops
        self._scale = scale
        self._policy = policy
        self._prefill = prefill
        self._rotator = rotator
        self._device = state.pages.device
        self._thresholds: dict[int, Thresholds] = {}
        self._limits: dict[int, int] = {}
        self._over_limit: set[int] = set()
        self._carried_queries: dict[tuple[int, int], Tensor] = {}
        self.value_range = ValueRange(state.num_layers, self._device, *_fewest_bits(state.layout))

    def __contains__(self, slot: int) -> bool:
        """Whether a slot has a request."""
        return slot in self._thresholds

    def open(self, slot: int, thresholds: Thresholds, max_pages: int | None) -> None:
        """Begin a request, see `DiffKVCache.open`."""
        self._thresholds[slot] = thresholds
        if max_pages is not None:
            self._limits[slot] = max_pages

    def close(self, slot: int) -> None:
        """Forget a request."""
        del self._thresholds[slot]
        self._limits.pop(slot, None)
        self._over_limit.discard(slot)
        for layer in range(self._state.num_layers):
            self._carried_queries.pop((slot, layer), None)

    def over_limit(self, slot: int) -> bool:
        """Whether a request's prompt needed more pages than it may take."""
        return slot in self._over_limit

    def compresses(self, chunk: PromptChunk) -> bool:
        """Whether a prompt's tokens are sorted into tiers with this chunk."""
        return chunk.is_last and self._decides(chunk)

    def _decides(self, chunk: PromptChunk) -> bool:
        """Whether a prompt's tokens are sorted into tiers."""
        return self._policy.decides(self._thresholds_of(chunk.slot))

    def _thresholds_of(self, slot: int) -> Thresholds:
        """A request's thresholds as they are with the tiers that there are."""
        return self._thresholds[slot].for_tiers(self._state.layout.low is not None)

    def plan(self, chunks: Sequence[PromptChunk]) -> PromptPlan:
        """Plan some chunks for all layers. A prompt over its limit is decided, and not stored."""
        decided = [self._thresholds_of(c.slot) if self.compresses(c) else None for c in chunks]
        return PromptPlan.of(chunks, decided, self._policy, self._state.window, self._device)

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
        query, key, value = query[rows], key[rows], value[rows]
        rotated_key, rotated_value = self._rotator.rotate(key), self._rotator.rotate(value)
        self.value_range.look(layer, rotated_key, rotated_value)
        whole = self._with_stored(layer, plan, rotated_key, rotated_value)
        out = output[rows]
        if whole:
            self._attend_chunks(plan, query, key, value, whole, out)
        else:
            self._prefill(query, key, value, plan.spans, self._scale, out)
        if not isinstance(rows, slice):
            output[rows] = out
        if plan.undecided is not None:
            self._carry_queries(layer, plan, plan.undecided.chunks, query)
            self._store_high(layer, plan.undecided, rotated_key, rotated_value)
        if plan.complete is not None:
            if plan.complete.stored_slots is None:
                new = plan.complete.packing.rows
                rotated_key, rotated_value = rotated_key[new], rotated_value[new]
            else:
                rotated_key, rotated_value = self._whole(
                    plan, plan.complete, rotated_key, rotated_value, whole
                )
            queries = self._scored_queries(layer, plan, plan.complete, query)
            self._store_decided(layer, plan.complete, queries, rotated_key, rotated_value)

    def _with_stored(
        self, layer: int, plan: PromptPlan, key: Tensor, value: Tensor
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Rotated keys and values up to its end of each chunk with earlier ones, which are read back."""
        whole = {}
        for chunk, span in plan.parts:
            if chunk.num_stored:
                k, v, _, _ = self._ops.gather(self._state, layer, chunk.slot, chunk.num_stored)
                whole[chunk.slot] = (
                    torch.cat([k.transpose(0, 1), key[span]]),
                    torch.cat([v.transpose(0, 1), value[span]]),
                )
        return whole

    def _attend_chunks(
        self,
        plan: PromptPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        whole: dict[int, tuple[Tensor, Tensor]],
        output: Tensor,
    ) -> None:
        """Attend where some chunks have earlier ones."""
        queries, keys, values = [], [], []
        for chunk, span in plan.parts:
            stored = whole.get(chunk.slot)
            queries.append(query[span] if stored is None else self._rotator.rotate(query[span]))
            keys.append(key[span] if stored is None else stored[0])
            values.append(value[span] if stored is None else stored[1])
        packed = joined(queries), joined(keys), joined(values)
        self._prefill(*packed, plan.spans, self._scale, output)
        for chunk, span in plan.parts:
            if chunk.slot in whole:
                self._rotator.unrotate(output[span])

    @staticmethod
    def _whole(
        plan: PromptPlan,
        scoring: Scoring,
        key: Tensor,
        value: Tensor,
        whole: dict[int, tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of complete prompts, some of which have earlier chunks."""
        spans = {chunk.slot: span for chunk, span in plan.parts}
        slots = [chunk.slot for chunk in scoring.packing.chunks]
        pairs = [whole.get(slot) or (key[spans[slot]], value[spans[slot]]) for slot in slots]
        return joined([k for k, _ in pairs]), joined([v for _, v in pairs])

    def _carry_queries(
        self, layer: int, plan: PromptPlan, chunks: Sequence[PromptChunk], query: Tensor
    ) -> None:
        """Keep those queries of early chunks that are among the ones that score their prompts."""
        undecided = {chunk.slot for chunk in chunks}
        for chunk, span in plan.parts:
            first = max(chunk.num_stored, chunk.prompt_len - self._policy.scored_queries)
            scored = chunk.end - first
            if chunk.slot not in undecided or chunk.is_last or scored <= 0:
                continue
            if self._decides(chunk):
                latest = self._rotator.rotate(query[span.stop - scored : span.stop])
                earlier = self._carried_queries.get((chunk.slot, layer))
                self._carried_queries[chunk.slot, layer] = (
                    latest.clone() if earlier is None else torch.cat([earlier, latest])
                )

    def _scored_queries(
        self, layer: int, plan: PromptPlan, scoring: Scoring, query: Tensor
    ) -> Tensor:
        """The rotated queries that score complete prompts, those of earlier chunks included."""
        if scoring.query_rows is not None:
            return self._rotator.rotate(query[scoring.query_rows])
        spans = {chunk.slot: span for chunk, span in plan.parts}
        queries = []
        for chunk in scoring.packing.chunks:
            scored, span = self._policy.scored_queries, spans[chunk.slot]
            latest = self._rotator.rotate(query[max(span.start, span.stop - scored) : span.stop])
            earlier = self._carried_queries.pop((chunk.slot, layer), None)
            queries.append(latest if earlier is None else torch.cat([earlier, latest]))
        return joined(queries)

    def _store_high(self, layer: int, packing: Packing, key: Tensor, value: Tensor) -> None:
        key, value = key[packing.rows], value[packing.rows]
        shape = (self._state.num_kv_heads, len(key))
        tiers = torch.full(shape, HIGH, dtype=torch.int8, device=self._device)
        sums = torch.zeros(shape, dtype=torch.float32, device=self._device)
        tokens = self._within_limit(packing, packing.tokens(key, value))
        self._ops.store_prompt(self._state, layer, tokens, tiers, sums)

    def _store_decided(
        self, layer: int, scoring: Scoring, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Score whole prompts, choose their tiers and store them, in place of what was stored."""
        packing = scoring.packing
        sums = self._ops.significance(
            query, key, scoring.query_starts, packing.starts, self._scale, scoring.max_queries
        )
        means = sums / scoring.num_scored
        if self._policy.scored_queries != SCORED_QUERIES:
            # Decode divides by `num_seen`, whoever has scored the prompt
            sums = means * scoring.num_seen
        if scoring.bounds is not None:
            tiers = scoring.bounds.tiers(means)
        else:
            tiers = self._tiers(packing, means, key)
        self._keep_limits(packing, tiers)
        tokens = self._within_limit(packing, packing.tokens(key, value))
        if scoring.stored_slots is not None:
            self._ops.release(self._state, scoring.stored_slots, layer)
        self._ops.store_prompt(self._state, layer, tokens, tiers, sums)

    def _tiers(self, packing: Packing, means: Tensor, key: Tensor) -> Tensor:
        """Tiers by a policy that looks at one prompt at a time."""
        tiers = torch.empty(means.shape, dtype=torch.int8, device=means.device)
        start = 0
        for chunk in packing.chunks:
            span = slice(start, start + chunk.prompt_len)
            thresholds = self._thresholds_of(chunk.slot)
            tiers[:, span] = self._policy.decide(
                means[:, span], key[span], thresholds, self._state.window
            )
            start = span.stop
        return tiers

    def _keep_limits(self, packing: Packing, tiers: Tensor) -> None:
        """Take their pages from prompts that this layer would bring over their limits."""
        start = 0
        for chunk in packing.chunks:
            span = slice(start, start + chunk.prompt_len)
            start = span.stop
            limit = self._limits.get(chunk.slot)
            if limit is None or self.over_limit(chunk.slot):
                continue
            slot = on_device([chunk.slot], torch.int32, self._device)
            held = int(pool.held_pages(self._state, slot))
            if held + pool.prompt_pages(self._state.layout, tiers[:, span]) > limit:
                self._over_limit.add(chunk.slot)
                self._ops.release(self._state, slot, -1)

    def _within_limit(self, packing: Packing, tokens: PromptTokens) -> PromptTokens:
        """The tokens, but for those of prompts that are over their limits."""
        if not any(self.over_limit(chunk.slot) for chunk in packing.chunks):
            return tokens
        kept = [-1 if self.over_limit(c.slot) else c.slot for c in packing.chunks]
        return replace(tokens, slots=on_device(kept, torch.int32, self._device))
