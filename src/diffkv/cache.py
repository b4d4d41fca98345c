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
from diffkv.policy import HIGH, SCORED_QUERIES, Thresholds, num_queries_seen
from diffkv.prefill import Prefill, torch_prefill
from diffkv.state import CacheState, PoolState, PromptTokens
from diffkv.steps import PromptChunk, Step, joined, pack, slot_tensor, starts_of

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
        nobody, one = self._slot_tensor([-1]), starts_of([1], self._device)
        pool = self.state.pool
        shape = (pool.num_kv_heads, pool.layout.head_dim)
        device, dtype = self._device, pool.dtype
        key = torch.zeros(1, *shape, dtype=dtype, device=device)
        query = torch.zeros(1, num_q_heads, shape[1], dtype=dtype, device=device)
        sums = self._ops.significance(query, key, one, one, self._scale, SCORED_QUERIES)
        tiers = torch.full(sums.shape, HIGH, dtype=torch.int8, device=device)
        tokens = PromptTokens(nobody, one, key, key, torch.zeros_like(nobody))
        for group in self.state.groups:
            self._ops.store_prompt(group, 0, tokens, tiers, sums)
            plan = self._ops.plan_decode(group, nobody, torch.ones_like(nobody))
            self._ops.append(group, 0, plan, key, key)
            self._ops.attend(group, 0, nobody, query, self._scale, torch.empty_like(query))
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
            ValueError: the slot is not empty, or alpha_low is above 0 and the layout does not drop.
        """
        if slot in self._thresholds:
            raise ValueError(f"slot {slot} already has a request")
        if not self._policy.uses_thresholds:
            thresholds = Thresholds()
        if thresholds.alpha_low > 0 and not self.state.pool.layout.drops:
            raise ValueError(f"alpha_low must be 0 without drops, got {thresholds.alpha_low}")
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
        return Step(tuple(prompts), decode_rows, plans)

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
        if step.prompts:
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
        prompts: Sequence[PromptChunk],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
    ) -> None:
        """Attend exactly, then store. Only what has been stored before is attended to as rotated."""
        group, _ = self._group(layer)
        rotated_key, rotated_value = self._rotated(key), self._rotated(value)
        queries, keys, values = [], [], []
        for chunk in prompts:
            span, q = chunk.span, query[chunk.span]
            if chunk.num_stored:
                q = self._rotated(q)
                k, v = self._with_stored(layer, chunk, rotated_key[span], rotated_value[span])
            else:
                k, v = key[span], value[span]
            queries.append(q)
            keys.append(k)
            values.append(v)
        outputs = [output[chunk.span] for chunk in prompts]
        self._prefill(queries, keys, values, self._scale, outputs)
        undecided: list[tuple[PromptChunk, Tensor, Tensor]] = []
        complete: list[tuple[PromptChunk, Tensor, Tensor, Tensor]] = []
        for chunk, q, all_k, all_v, out in zip(
            prompts, queries, keys, values, outputs, strict=True
        ):
            k, v = rotated_key[chunk.span], rotated_value[chunk.span]
            if chunk.num_stored:
                self._turn_back(out)
            q = q[-self._policy.scored_queries :]
            if not chunk.num_stored:
                q, all_k, all_v = self._rotated(q), k, v
            if chunk.slot in self._given_up:
                continue
            if not (chunk.is_last and self._decides(group, chunk)):
                self._carry_queries(layer, chunk, q)
                undecided.append((chunk, k, v))
            else:
                q = self._scored_queries(layer, chunk, q)
                complete.append((chunk, q, all_k, all_v))
        if undecided:
            self._store_high(layer, undecided)
        if complete:
            self._store_decided(layer, complete)

    def _with_stored(
        self, layer: int, chunk: PromptChunk, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a prompt up to its chunk's end, earlier chunks read back from pages."""
        group, index = self._group(layer)
        stored_k, stored_v, _, _ = self._ops.gather(group, index, chunk.slot, chunk.num_stored)
        return (
            torch.cat([stored_k.transpose(0, 1), key]),
            torch.cat([stored_v.transpose(0, 1), value]),
        )

    def _group(self, layer: int) -> tuple[PoolState, int]:
        """The group of a layer of the model, and which of its layers that is."""
        number, index = self._places[layer]
        return self.state.groups[number], index

    def _carry_queries(self, layer: int, chunk: PromptChunk, query: Tensor) -> None:
        """Keep the queries of an early chunk that are among those that score the prompt."""
        scored = chunk.end - max(chunk.num_stored, chunk.prompt_len - self._policy.scored_queries)
        group, _ = self._group(layer)
        if chunk.is_last or scored <= 0 or not self._decides(group, chunk):
            return
        earlier = self._carried_queries.get((chunk.slot, layer))
        latest = query[-scored:].clone()
        self._carried_queries[chunk.slot, layer] = (
            latest if earlier is None else torch.cat([earlier, latest])
        )

    def _scored_queries(self, layer: int, chunk: PromptChunk, query: Tensor) -> Tensor:
        """The queries that score a prompt, those of earlier chunks included."""
        earlier = self._carried_queries.pop((chunk.slot, layer), None)
        query = query[-self._policy.scored_queries :]
        return query if earlier is None else torch.cat([earlier, query])

    def _store_high(self, layer: int, chunks: list[tuple[PromptChunk, Tensor, Tensor]]) -> None:
        tokens = pack(
            [c.slot for c, _, _ in chunks],
            [k for _, k, _ in chunks],
            [v for _, _, v in chunks],
            [c.num_stored for c, _, _ in chunks],
        )
        group, index = self._group(layer)
        shape = (group.num_kv_heads, tokens.key.shape[0])
        tiers = torch.full(shape, HIGH, dtype=torch.int8, device=tokens.key.device)
        sums = torch.zeros(shape, dtype=torch.float32, device=tokens.key.device)
        self._ops.store_prompt(group, index, tokens, tiers, sums)

    def _store_decided(
        self, layer: int, prompts: list[tuple[PromptChunk, Tensor, Tensor, Tensor]]
    ) -> None:
        """Score whole prompts, choose their tiers and store them, in place of what was stored."""
        group, index = self._group(layer)
        chunks = [c for c, _, _, _ in prompts]
        tokens = pack(
            [c.slot for c in chunks], [k for _, _, k, _ in prompts], [v for _, _, _, v in prompts],
            [0] * len(prompts),
        )  # fmt: skip
        queries = [q for _, q, _, _ in prompts]
        scored = self._policy.scored_queries
        sums = self._ops.significance(
            joined(queries), tokens.key, starts_of([len(q) for q in queries], self._device),
            tokens.cu_seqlens, self._scale, min(scored, max(len(q) for q in queries)),
        )  # fmt: skip
        tiers = torch.empty(sums.shape, dtype=torch.int8, device=sums.device)
        start = 0
        for chunk in chunks:
            span = slice(start, start + chunk.prompt_len)
            length = torch.tensor(chunk.prompt_len, device=sums.device)
            seen = num_queries_seen(tokens.positions[span], length, length)
            if scored == SCORED_QUERIES:
                means = sums[:, span] / seen
            else:  # decode divides by `seen`, whoever has scored the prompt
                means = sums[:, span] / (length - tokens.positions[span]).clamp(max=scored)
                sums[:, span] = means * seen
            thresholds = self._thresholds_of(group, chunk.slot)
            tiers[:, span] = self._policy.decide(means, tokens.key[span], thresholds, group.window)
            start = span.stop
            self._keep_limit(chunk, group, tiers[:, span])
        kept = [-1 if c.slot in self._given_up else c.slot for c in chunks]
        tokens = replace(tokens, slots=self._slot_tensor(kept))
        stored = [c.slot for c in chunks if c.num_stored]
        if stored:
            self._ops.release(group, self._slot_tensor(stored), index)
        self._ops.store_prompt(group, index, tokens, tiers, sums)

    def _keep_limit(self, chunk: PromptChunk, group: PoolState, tiers: Tensor) -> None:
        """Give a prompt up, and its pages back, if a layer of `group` would bring it over its limit."""
        limit = self._limits.get(chunk.slot)
        if limit is None:
            return
        slot = self._slot_tensor([chunk.slot])
        held = sum(int(pool.held_pages(each, slot)) for each in self.state.groups)
        if held + pool.prompt_pages(group.layout, tiers) > limit:
            self._given_up.add(chunk.slot)
            for each in self.state.groups:
                self._ops.release(each, slot, -1)

    def _slot_tensor(self, slots: Sequence[int]) -> Tensor:
        return slot_tensor(slots, self._device)
