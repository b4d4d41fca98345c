"""The way of prompts into the cache: exact attention, then tiers by the attention received.

Prompts may come in chunks: earlier chunks are stored all high, undecided; the last one decides for the
whole prompt, as if it had come at once. The queries that score a prompt wait for it here.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffkv import pool
from diffkv.ops import Ops
from diffkv.policies import Policy
from diffkv.policy import HIGH, SCORED_QUERIES, Thresholds
from diffkv.prefill import Prefill
from diffkv.state import CacheState, PoolState, PromptTokens
from diffkv.steps import Decision, Packing, PromptChunk, Prompts, joined, on_device
from diffkv.turn import Turn
from diffkv.value_range import ValueRange

__all__ = ["PromptPath"]


def _fewest_bits(state: CacheState) -> tuple[int, int]:
    """Bits of keys and of values, in the tiers that have fewest."""
    formats = [tier.format for group in state.groups for tier in group.layout.tiers]
    return min(f.k_bits for f in formats), min(f.v_bits for f in formats)


class PromptPath:
    """Attends among prompts, decides them and stores them, for every layer of one model.

    Its arguments are those of `DiffKVCache`, but for `turn`, which rotates vectors on their way.
    """

    def __init__(
        self,
        state: CacheState,
        ops: Ops,
        scale: float,
        policy: Policy,
        prefill: Prefill,
        turn: Turn,
    ) -> None:
        self._state = state
        self._ops = ops
        self._scale = scale
        self._policy = policy
        self._prefill = prefill
        self._turn = turn
        self._places = state.places
        self._device = state.pool.pages.device
        self._thresholds: dict[int, Thresholds] = {}
        self._limits: dict[int, int] = {}
        self._given_up: set[int] = set()
        self._carried_queries: dict[tuple[int, int], Tensor] = {}
        self.value_range = ValueRange(state.num_layers, self._device, *_fewest_bits(state))

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
        self._given_up.discard(slot)
        for layer in range(self._state.num_layers):
            self._carried_queries.pop((slot, layer), None)

    def gave_up(self, slot: int) -> bool:
        """Whether a request's prompt needed more pages than it may take."""
        return slot in self._given_up

    def compresses(self, chunk: PromptChunk) -> bool:
        """Whether a prompt's tokens are sorted into tiers with this chunk, in any layer."""
        return chunk.is_last and any(self._decides(g, chunk) for g in self._state.groups)

    def _decides(self, group: PoolState, chunk: PromptChunk) -> bool:
        """Whether a prompt's tokens are sorted into tiers in the layers of a group."""
        return self._policy.decides(self._thresholds_of(group, chunk.slot))

    def _thresholds_of(self, group: PoolState, slot: int) -> Thresholds:
        """A request's thresholds as they are in the layers of a group."""
        return self._thresholds[slot].for_tiers(group.layout.low is not None)

    def described(self, chunks: Sequence[PromptChunk]) -> Prompts:
        """What all layers ask of some chunks. A prompt that was given up is decided, and not stored."""
        groups = self._state.groups
        decided = [
            [
                self._thresholds_of(g, c.slot) if c.is_last and self._decides(g, c) else None
                for c in chunks
            ]
            for g in groups
        ]
        windows = [group.window for group in groups]
        return Prompts.of(chunks, decided, self._policy, windows, self._device)

    def attend(
        self,
        layer: int,
        prompts: Prompts,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
    ) -> None:
        """Attend exactly, then store. Only what has been stored before is attended to as rotated.

        Args:
            layer: which layer.
            prompts: of this step.
            query: [num_rows, num_q_heads, head_dim], packed batch.
            key: [num_rows, num_kv_heads, head_dim].
            value: [num_rows, num_kv_heads, head_dim].
            output: [num_rows, num_q_heads, head_dim], written for the prompts' rows.
        """
        fate = prompts.fates[self._places[layer][0]]
        query, key, value = query[prompts.rows], key[prompts.rows], value[prompts.rows]
        turned_key, turned_value = self._turn.there(key), self._turn.there(value)
        self.value_range.look(layer, turned_key, turned_value)
        whole = self._with_stored(layer, prompts, turned_key, turned_value)
        out = output[prompts.rows]
        if whole:
            self._attend_chunks(prompts, query, key, value, whole, out)
        else:
            self._prefill(query, key, value, prompts.spans, self._scale, out)
        if not isinstance(prompts.rows, slice):
            output[prompts.rows] = out
        if fate.undecided is not None:
            self._carry_queries(layer, prompts, fate.undecided.chunks, query)
            self._store_high(layer, fate.undecided, turned_key, turned_value)
        if fate.complete is not None:
            if fate.complete.stored_slots is None:
                rows = fate.complete.packing.rows
                turned_key, turned_value = turned_key[rows], turned_value[rows]
            else:
                turned_key, turned_value = self._whole(
                    prompts, fate.complete, turned_key, turned_value, whole
                )
            queries = self._scored_queries(layer, prompts, fate.complete, query)
            self._store_decided(layer, fate.complete, queries, turned_key, turned_value)

    def _with_stored(
        self, layer: int, prompts: Prompts, key: Tensor, value: Tensor
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Rotated keys and values up to its end of each chunk with earlier ones, which are read back."""
        group, index = self._group(layer)
        whole = {}
        for chunk, span in prompts.parts:
            if chunk.num_stored:
                k, v, _, _ = self._ops.gather(group, index, chunk.slot, chunk.num_stored)
                whole[chunk.slot] = (
                    torch.cat([k.transpose(0, 1), key[span]]),
                    torch.cat([v.transpose(0, 1), value[span]]),
                )
        return whole

    def _attend_chunks(
        self,
        prompts: Prompts,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        whole: dict[int, tuple[Tensor, Tensor]],
        output: Tensor,
    ) -> None:
        """Attend where some chunks have earlier ones."""
        queries, keys, values = [], [], []
        for chunk, span in prompts.parts:
            stored = whole.get(chunk.slot)
            queries.append(query[span] if stored is None else self._turn.there(query[span]))
            keys.append(key[span] if stored is None else stored[0])
            values.append(value[span] if stored is None else stored[1])
        packed = joined(queries), joined(keys), joined(values)
        self._prefill(*packed, prompts.spans, self._scale, output)
        for chunk, span in prompts.parts:
            if chunk.slot in whole:
                self._turn.back(output[span])

    @staticmethod
    def _whole(
        prompts: Prompts,
        decision: Decision,
        key: Tensor,
        value: Tensor,
        whole: dict[int, tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of complete prompts, some of which have earlier chunks."""
        spans = {chunk.slot: span for chunk, span in prompts.parts}
        slots = [chunk.slot for chunk in decision.packing.chunks]
        pairs = [whole.get(slot) or (key[spans[slot]], value[spans[slot]]) for slot in slots]
        return joined([k for k, _ in pairs]), joined([v for _, v in pairs])

    def _group(self, layer: int) -> tuple[PoolState, int]:
        """The group of a layer of the model, and which of its layers that is."""
        number, index = self._places[layer]
        return self._state.groups[number], index

    def _carry_queries(
        self, layer: int, prompts: Prompts, chunks: Sequence[PromptChunk], query: Tensor
    ) -> None:
        """Keep those queries of early chunks that are among the ones that score their prompts."""
        group, _ = self._group(layer)
        undecided = {chunk.slot for chunk in chunks}
        for chunk, span in prompts.parts:
            first = max(chunk.num_stored, chunk.prompt_len - self._policy.scored_queries)
            scored = chunk.end - first
            if chunk.slot not in undecided or chunk.is_last or scored <= 0:
                continue
            if self._decides(group, chunk):
                latest = self._turn.there(query[span.stop - scored : span.stop])
                earlier = self._carried_queries.get((chunk.slot, layer))
                self._carried_queries[chunk.slot, layer] = (
                    latest.clone() if earlier is None else torch.cat([earlier, latest])
                )

    def _scored_queries(
        self, layer: int, prompts: Prompts, decision: Decision, query: Tensor
    ) -> Tensor:
        """The rotated queries that score complete prompts, those of earlier chunks included."""
        if decision.query_rows is not None:
            return self._turn.there(query[decision.query_rows])
        spans = {chunk.slot: span for chunk, span in prompts.parts}
        queries = []
        for chunk in decision.packing.chunks:
            scored, span = self._policy.scored_queries, spans[chunk.slot]
            latest = self._turn.there(query[max(span.start, span.stop - scored) : span.stop])
            earlier = self._carried_queries.pop((chunk.slot, layer), None)
            queries.append(latest if earlier is None else torch.cat([earlier, latest]))
        return joined(queries)

    def _store_high(self, layer: int, packing: Packing, key: Tensor, value: Tensor) -> None:
        key, value = key[packing.rows], value[packing.rows]
        group, index = self._group(layer)
        shape = (group.num_kv_heads, len(key))
        tiers = torch.full(shape, HIGH, dtype=torch.int8, device=self._device)
        sums = torch.zeros(shape, dtype=torch.float32, device=self._device)
        tokens = self._without_given_up(packing, packing.tokens(key, value))
        self._ops.store_prompt(group, index, tokens, tiers, sums)

    def _store_decided(
        self, layer: int, decision: Decision, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Score whole prompts, choose their tiers and store them, in place of what was stored."""
        group, index = self._group(layer)
        packing = decision.packing
        sums = self._ops.significance(
            query, key, decision.query_starts, packing.starts, self._scale, decision.max_queries
        )
        means = sums / decision.num_scored
        if self._policy.scored_queries != SCORED_QUERIES:
            # Decode divides by `num_seen`, whoever has scored the prompt
            sums = means * decision.num_seen
        if decision.bounds is not None:
            tiers = decision.bounds.tiers(means)
        else:
            tiers = self._tiers(group, packing, means, key)
        self._keep_limits(group, packing, tiers)
        tokens = self._without_given_up(packing, packing.tokens(key, value))
        if decision.stored_slots is not None:
            self._ops.release(group, decision.stored_slots, index)
        self._ops.store_prompt(group, index, tokens, tiers, sums)

    def _tiers(self, group: PoolState, packing: Packing, means: Tensor, key: Tensor) -> Tensor:
        """By a policy that looks at one prompt at a time."""
        tiers = torch.empty(means.shape, dtype=torch.int8, device=means.device)
        start = 0
        for chunk in packing.chunks:
            span = slice(start, start + chunk.prompt_len)
            thresholds = self._thresholds_of(group, chunk.slot)
            tiers[:, span] = self._policy.decide(
                means[:, span], key[span], thresholds, group.window
            )
            start = span.stop
        return tiers

    def _keep_limits(self, group: PoolState, packing: Packing, tiers: Tensor) -> None:
        """Give prompts up, and their pages back, that this layer would bring over their limits."""
        start = 0
        for chunk in packing.chunks:
            span = slice(start, start + chunk.prompt_len)
            start = span.stop
            limit = self._limits.get(chunk.slot)
            if limit is None or chunk.slot in self._given_up:
                continue
            slot = on_device([chunk.slot], torch.int32, self._device)
            held = sum(int(pool.held_pages(each, slot)) for each in self._state.groups)
            if held + pool.prompt_pages(group.layout, tiers[:, span]) > limit:
                self._given_up.add(chunk.slot)
                for each in self._state.groups:
                    self._ops.release(each, slot, -1)

    def _without_given_up(self, packing: Packing, tokens: PromptTokens) -> PromptTokens:
        if not any(self.gave_up(chunk.slot) for chunk in packing.chunks):
            return tokens
        kept = [-1 if self.gave_up(c.slot) else c.slot for c in packing.chunks]
        return replace(tokens, slots=on_device(kept, torch.int32, self._device))
