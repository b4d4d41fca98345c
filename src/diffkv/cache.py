"""The KV cache of one model on one device: prompts and tokens in, attention out.

Knows requests only as slots and no engine at all. Prompts may come in chunks: earlier chunks are stored
all high, undecided; the last one decides for the whole prompt, as if it had come at once.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffkv import pool
from diffkv.ops import Ops
from diffkv.policies import PAPER, Policy
from diffkv.policy import HIGH, SCORED_QUERIES, Thresholds
from diffkv.prefill import Prefill, torch_prefill
from diffkv.state import CacheState, PoolState, PromptTokens
from diffkv.steps import Decision, Packing, PromptChunk, Prompts, Step, joined, on_device

__all__ = ["DiffKVCache", "PromptChunk", "Step"]


class DiffKVCache:
    """Stores, decides and attends, for every layer of one model.

    Args:
        state: the pool, and the tables of all layers.
        ops: the kernels, as `diffkv.ops.load` returns them.
        scale: of the attention's dot products.
        policy: decides the tiers of prompts.
        prefill: exact attention of prompts.
        signs: of the rotation of queries, keys and values, which spreads their outliers
            (`diffkv.rotation`); None for none.
    """

    def __init__(
        self,
        state: CacheState,
        ops: Ops,
        scale: float,
        policy: Policy = PAPER,
        prefill: Prefill = torch_prefill,
        signs: Tensor | None = None,
    ) -> None:
        self.state = state
        self._ops = ops
        self._scale = scale
        self._policy = policy
        self._prefill = prefill
        self._places = state.places
        self._device = state.pool.pages.device
        self._signs = signs
        self._thresholds: dict[int, Thresholds] = {}
        self._limits: dict[int, int] = {}
        self._given_up: set[int] = set()
        self._carried_queries: dict[tuple[int, int], Tensor] = {}

    def warm_up(self, num_q_heads: int) -> None:
        """Run every operation once on nothing, so that compiling does not delay the first request.

        Args:
            num_q_heads: query heads of a layer, on this rank.
        """
        nobody, one = self._slot_tensor([-1]), on_device([0, 1], torch.int32, self._device)
        pool = self.state.pool
        shape = (pool.num_kv_heads, pool.layout.head_dim)
        device, dtype = self._device, pool.dtype
        key = torch.zeros(1, *shape, dtype=dtype, device=device)
        query = torch.zeros(1, num_q_heads, shape[1], dtype=dtype, device=device)
        self._turn_back(query)
        key = self._rotated(key)
        sums = self._ops.significance(query, key, one, one, self._scale, SCORED_QUERIES)
        tiers = torch.full(sums.shape, HIGH, dtype=torch.int8, device=device)
        tokens = PromptTokens(nobody, one, key, key, torch.zeros_like(nobody))
        for group in self.state.groups:
            self._ops.store_prompt(group, 0, tokens, tiers, sums)
            plan = self._ops.plan_decode(group, nobody, torch.ones_like(nobody))
            self._ops.append(group, 0, plan, key, key)
            self._ops.attend(group, 0, nobody, query, self._scale, torch.empty_like(query))
            self._ops.gather(group, 0, 0, 1)
            self._ops.release(group, nobody, -1)

    def open(
        self, slot: int, prompt_len: int, thresholds: Thresholds, max_pages: int | None = None
    ) -> None:
        """Begin a request in an empty slot. A policy without thresholds lets go of them.

        Args:
            slot: which.
            prompt_len: tokens of the prompt.
            thresholds: of the request.
            max_pages: that the prompt may take in all layers; one that needs more is given up: it
                attends as ever, but keeps no page. None: as many as it needs.

        Raises:
            ValueError: the slot is not empty.
        """
        if slot in self._thresholds:
            raise ValueError(f"slot {slot} already has a request")
        if not self._policy.uses_thresholds:
            thresholds = Thresholds()
        self._thresholds[slot] = thresholds
        if max_pages is not None:
            self._limits[slot] = max_pages
        shared = self.state.pool
        shared.prompt_lens[slot] = prompt_len
        shared.thresholds[slot, 0] = thresholds.alpha_high
        shared.thresholds[slot, 1] = thresholds.alpha_low

    def close(self, slots: Sequence[int]) -> None:
        """End requests: all their pages are free again."""
        if not slots:
            return
        for slot in slots:
            del self._thresholds[slot]
            self._limits.pop(slot, None)
            self._given_up.discard(slot)
            for layer in range(self.state.num_layers):
                self._carried_queries.pop((slot, layer), None)
        for group in self.state.groups:
            self._ops.release(group, self._slot_tensor(slots), -1)

    def compresses(self, chunk: PromptChunk) -> bool:
        """Whether a prompt's tokens are sorted into tiers with this chunk, in any layer."""
        return chunk.is_last and any(self._decides(g, chunk) for g in self.state.groups)

    def _decides(self, group: PoolState, chunk: PromptChunk) -> bool:
        """Whether a prompt's tokens are sorted into tiers in the layers of a group."""
        return self._policy.decides(self._thresholds_of(group, chunk.slot))

    def _thresholds_of(self, group: PoolState, slot: int) -> Thresholds:
        """A request's thresholds as they are in the layers of a group."""
        return self._thresholds[slot].for_tiers(group.layout.low is not None)

    def gave_up(self, slot: int) -> bool:
        """Whether a request's prompt needed more pages than it may take."""
        return slot in self._given_up

    def plan(
        self,
        prompts: Sequence[PromptChunk],
        decode_rows: slice | Tensor,
        slots: Tensor,
        seq_lens: Tensor,
    ) -> Step:
        """Plan a step: decide for all layers, group by group, what the generated tokens replace.

        Args:
            prompts: chunks of prompts in this step.
            decode_rows: rows of the batch that are generated tokens.
            slots: [R] int32, request of each of those rows; -1 for padding.
            seq_lens: [R] int32, tokens of each request with the new one.
        """
        groups = self.state.groups if slots.numel() else ()
        plans = tuple(self._ops.plan_decode(group, slots, seq_lens) for group in groups)
        return Step(self._described(prompts) if prompts else None, decode_rows, plans)

    def _described(self, chunks: Sequence[PromptChunk]) -> Prompts:
        """What all layers ask of some chunks. A prompt that was given up is decided, and not stored."""
        groups = self.state.groups
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
        self, layer: int, step: Step, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        """One layer of a step: store its keys and values, and attend.

        Args:
            layer: which layer.
            step: as planned.
            query: [num_rows, num_q_heads, head_dim], packed batch, rotary embedding applied.
            key: [num_rows, num_kv_heads, head_dim].
            value: [num_rows, num_kv_heads, head_dim].
            output: [num_rows, num_q_heads, head_dim], written for the step's rows.
        """
        if step.prompts is not None:
            self._attend_prompts(layer, step.prompts, query, key, value, output)
        if step.plans:
            rows = step.decode_rows
            self._attend_generated(layer, step, query[rows], key[rows], value[rows], output)

    def _rotated(self, vectors: Tensor) -> Tensor:
        """As they are stored."""
        if self._signs is None:
            return vectors
        out = torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
        self._ops.rotate(vectors, self._signs, False, out)
        return out

    def _turn_back(self, output: Tensor) -> None:
        """Turn what was attended among rotated vectors back, in place."""
        if self._signs is not None:
            self._ops.rotate(output, self._signs, True, output)

    def _attend_generated(
        self, layer: int, step: Step, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        number, index = self._places[layer]
        group, plan = self.state.groups[number], step.plans[number]
        query, key, value = (self._rotated(x).contiguous() for x in (query, key, value))
        self._ops.append(group, index, plan, key, value)
        rows = step.decode_rows
        if isinstance(rows, slice) and output[rows].is_contiguous():
            out = output[rows]
        else:
            out = torch.empty_like(output[rows])
        self._ops.attend(group, index, plan.slots, query, self._scale, out)
        self._turn_back(out)
        if out.data_ptr() != output[rows].data_ptr():
            output[rows] = out

    def _attend_prompts(
        self,
        layer: int,
        prompts: Prompts,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
    ) -> None:
        """Attend exactly, then store. Only what has been stored before is attended to as rotated."""
        fate = prompts.fates[self._places[layer][0]]
        query, key, value = query[prompts.rows], key[prompts.rows], value[prompts.rows]
        turned_key, turned_value = self._rotated(key), self._rotated(value)
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
            if fate.complete.query_rows is None:
                queries = self._scored_queries(layer, prompts, fate.complete.packing.chunks, query)
            else:
                queries = self._rotated(query[fate.complete.query_rows])
            if fate.complete.stored_slots is None:
                rows = fate.complete.packing.rows
                keys, values = turned_key[rows], turned_value[rows]
            else:
                keys, values = self._whole(prompts, fate.complete, turned_key, turned_value, whole)
            self._store_decided(layer, fate.complete, queries, keys, values)

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
            queries.append(query[span] if stored is None else self._rotated(query[span]))
            keys.append(key[span] if stored is None else stored[0])
            values.append(value[span] if stored is None else stored[1])
        packed = joined(queries), joined(keys), joined(values)
        self._prefill(*packed, prompts.spans, self._scale, output)
        for chunk, span in prompts.parts:
            if chunk.slot in whole:
                self._turn_back(output[span])

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
        return self.state.groups[number], index

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
                latest = self._rotated(query[span.stop - scored : span.stop])
                earlier = self._carried_queries.get((chunk.slot, layer))
                self._carried_queries[chunk.slot, layer] = (
                    latest.clone() if earlier is None else torch.cat([earlier, latest])
                )

    def _scored_queries(
        self, layer: int, prompts: Prompts, chunks: Sequence[PromptChunk], query: Tensor
    ) -> Tensor:
        """The rotated queries that score complete prompts, those of earlier chunks included."""
        spans = {chunk.slot: span for chunk, span in prompts.parts}
        queries = []
        for chunk in chunks:
            scored, span = self._policy.scored_queries, spans[chunk.slot]
            latest = self._rotated(query[max(span.start, span.stop - scored) : span.stop])
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
            slot = self._slot_tensor([chunk.slot])
            held = sum(int(pool.held_pages(each, slot)) for each in self.state.groups)
            if held + pool.prompt_pages(group.layout, tiers[:, span]) > limit:
                self._given_up.add(chunk.slot)
                for each in self.state.groups:
                    self._ops.release(each, slot, -1)

    def _without_given_up(self, packing: Packing, tokens: PromptTokens) -> PromptTokens:
        if not any(self.gave_up(chunk.slot) for chunk in packing.chunks):
            return tokens
        kept = [-1 if self.gave_up(c.slot) else c.slot for c in packing.chunks]
        return replace(tokens, slots=self._slot_tensor(kept))

    def _slot_tensor(self, slots: Sequence[int]) -> Tensor:
        return on_device(slots, torch.int32, self._device)
