"""The KV cache of one model on one device: prompts and tokens in, attention out.

Knows requests only as slots and no engine at all. Prompts may come in chunks: earlier chunks are stored
all high, undecided; the last one decides for the whole prompt, as if it had come at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diffkv.ops import Ops
from diffkv.policies import PAPER, Policy
from diffkv.policy import HIGH, SCORED_QUERIES, Thresholds, num_queries_seen
from diffkv.state import DecodePlan, PoolState, PromptTokens

__all__ = ["DiffKVCache", "PromptChunk", "Step"]


@dataclass(frozen=True)
class PromptChunk:
    """Some tokens of one request's prompt, as a span of a packed batch.

    Attributes:
        slot: of the request.
        span: rows of the batch.
        num_stored: prompt tokens that came in earlier chunks.
        prompt_len: tokens of the whole prompt.
    """

    slot: int
    span: slice
    num_stored: int
    prompt_len: int

    @property
    def end(self) -> int:
        """Prompt tokens that are in the cache after this chunk."""
        return self.num_stored + self.span.stop - self.span.start

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete with this chunk."""
        return self.end == self.prompt_len


@dataclass(frozen=True)
class Step:
    """What one forward pass adds to the cache; the same for every layer.

    Attributes:
        prompts: chunks of prompts.
        decode_rows: [R] int64, rows of the batch that are generated tokens, or a slice of them.
        plan: where those tokens go; None if there are none.
    """

    prompts: tuple[PromptChunk, ...]
    decode_rows: slice | Tensor
    plan: DecodePlan | None


class DiffKVCache:
    """Stores, decides and attends, for every layer of one model.

    Args:
        state: the pool.
        ops: the kernels, as `diffkv.ops.load` returns them.
        scale: of the attention's dot products.
        policy: decides the tiers of prompts.
    """

    def __init__(self, state: PoolState, ops: Ops, scale: float, policy: Policy = PAPER) -> None:
        self.state = state
        self._ops = ops
        self._scale = scale
        self._policy = policy
        self._thresholds: dict[int, Thresholds] = {}
        self._carried_queries: dict[tuple[int, int], Tensor] = {}

    def warm_up(self, num_q_heads: int) -> None:
        """Run every operation once on nothing, so that compiling does not delay the first request.

        Args:
            num_q_heads: query heads of a layer, on this rank.
        """
        nobody, one = self._slot_tensor([-1]), self._starts([1])
        shape = (self.state.num_kv_heads, self.state.layout.head_dim)
        device, dtype = self.state.pages.device, self.state.dtype
        key = torch.zeros(1, *shape, dtype=dtype, device=device)
        query = torch.zeros(1, num_q_heads, shape[1], dtype=dtype, device=device)
        sums = self._ops.significance(query, key, one, one, self._scale, SCORED_QUERIES)
        tiers = torch.full(sums.shape, HIGH, dtype=torch.int8, device=device)
        tokens = PromptTokens(nobody, one, key, key, torch.zeros_like(nobody))
        self._ops.store_prompt(self.state, 0, tokens, tiers, sums)
        plan = self._ops.plan_decode(self.state, nobody, torch.ones_like(nobody))
        self._ops.append(self.state, 0, plan, key, key)
        self._ops.attend(self.state, 0, nobody, query, self._scale, torch.empty_like(query))
        self._ops.release(self.state, nobody, -1)

    def open(self, slot: int, prompt_len: int, thresholds: Thresholds) -> None:
        """Begin a request in an empty slot. A policy without thresholds lets go of them.

        Raises:
            ValueError: the slot is not empty.
        """
        if slot in self._thresholds:
            raise ValueError(f"slot {slot} already has a request")
        if not self._policy.uses_thresholds:
            thresholds = Thresholds()
        self._thresholds[slot] = thresholds
        self.state.prompt_lens[slot] = prompt_len
        self.state.thresholds[slot, 0] = thresholds.alpha_high
        self.state.thresholds[slot, 1] = thresholds.alpha_low

    def close(self, slots: Sequence[int]) -> None:
        """End requests: all their pages are free again."""
        if not slots:
            return
        for slot in slots:
            del self._thresholds[slot]
            for layer in range(self.state.num_layers):
                self._carried_queries.pop((slot, layer), None)
        self._ops.release(self.state, self._slot_tensor(slots), -1)

    def compresses(self, chunk: PromptChunk) -> bool:
        """Whether a prompt's tokens are sorted into tiers with this chunk."""
        return chunk.is_last and self._policy.decides(self._thresholds[chunk.slot])

    def plan(
        self,
        prompts: Sequence[PromptChunk],
        decode_rows: slice | Tensor,
        slots: Tensor,
        seq_lens: Tensor,
    ) -> Step:
        """Plan a step: decide for all layers what the generated tokens replace.

        Args:
            prompts: chunks of prompts in this step.
            decode_rows: rows of the batch that are generated tokens.
            slots: [R] int32, request of each of those rows; -1 for padding.
            seq_lens: [R] int32, tokens of each request with the new one.
        """
        plan = self._ops.plan_decode(self.state, slots, seq_lens) if slots.numel() else None
        return Step(tuple(prompts), decode_rows, plan)

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
        if step.plan is None:
            return
        rows = step.decode_rows
        self._ops.append(
            self.state, layer, step.plan, key[rows].contiguous(), value[rows].contiguous()
        )
        if isinstance(rows, slice) and output[rows].is_contiguous():
            out = output[rows]
        else:
            out = torch.empty_like(output[rows])
        self._ops.attend(
            self.state, layer, step.plan.slots, query[rows].contiguous(), self._scale, out
        )
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
        undecided: list[tuple[PromptChunk, Tensor, Tensor]] = []
        complete: list[tuple[PromptChunk, Tensor, Tensor, Tensor]] = []
        for chunk in prompts:
            q, k, v = query[chunk.span], key[chunk.span], value[chunk.span]
            all_k, all_v = k, v
            if chunk.num_stored:
                stored_k, stored_v, _, _ = self._ops.gather(
                    self.state, layer, chunk.slot, chunk.num_stored
                )
                all_k = torch.cat([stored_k.transpose(0, 1), k])
                all_v = torch.cat([stored_v.transpose(0, 1), v])
            output[chunk.span] = _causal_attention(q, all_k, all_v, self._scale)
            if not self.compresses(chunk):
                self._carry_queries(layer, chunk, q)
                undecided.append((chunk, k, v))
            else:
                q = self._scored_queries(layer, chunk, q)
                complete.append((chunk, q, all_k, all_v))
        if undecided:
            self._store_high(layer, undecided)
        if complete:
            self._store_decided(layer, complete)

    def _carry_queries(self, layer: int, chunk: PromptChunk, query: Tensor) -> None:
        """Keep the queries of an early chunk that are among those that score the prompt."""
        scored = chunk.end - max(chunk.num_stored, chunk.prompt_len - self._policy.scored_queries)
        if chunk.is_last or scored <= 0 or not self._policy.decides(self._thresholds[chunk.slot]):
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
        tokens = self._pack(
            [c.slot for c, _, _ in chunks],
            [k for _, k, _ in chunks],
            [v for _, _, v in chunks],
            [c.num_stored for c, _, _ in chunks],
        )
        shape = (self.state.num_kv_heads, tokens.key.shape[0])
        tiers = torch.full(shape, HIGH, dtype=torch.int8, device=tokens.key.device)
        sums = torch.zeros(shape, dtype=torch.float32, device=tokens.key.device)
        self._ops.store_prompt(self.state, layer, tokens, tiers, sums)

    def _store_decided(
        self, layer: int, prompts: list[tuple[PromptChunk, Tensor, Tensor, Tensor]]
    ) -> None:
        """Score whole prompts, choose their tiers and store them, in place of what was stored."""
        chunks = [c for c, _, _, _ in prompts]
        tokens = self._pack(
            [c.slot for c in chunks], [k for _, _, k, _ in prompts], [v for _, _, _, v in prompts],
            [0] * len(prompts),
        )  # fmt: skip
        queries = [q for _, q, _, _ in prompts]
        scored = self._policy.scored_queries
        sums = self._ops.significance(
            _join(queries), tokens.key, self._starts([len(q) for q in queries]),
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
            tiers[:, span] = self._policy.tiers(
                means, self._thresholds[chunk.slot], self.state.window
            )
            start = span.stop
        stored = [c.slot for c in chunks if c.num_stored]
        if stored:
            self._ops.release(self.state, self._slot_tensor(stored), layer)
        self._ops.store_prompt(self.state, layer, tokens, tiers, sums)

    def _pack(
        self, slots: list[int], keys: list[Tensor], values: list[Tensor], firsts: list[int]
    ) -> PromptTokens:
        lengths = [len(k) for k in keys]
        positions = torch.cat(
            [
                torch.arange(first, first + length, dtype=torch.int32)
                for first, length in zip(firsts, lengths, strict=True)
            ]
        ).to(self.state.pages.device)
        return PromptTokens(
            self._slot_tensor(slots), self._starts(lengths), _join(keys), _join(values), positions
        )

    def _slot_tensor(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(slots, dtype=torch.int32, device=self.state.pages.device)

    def _starts(self, lengths: list[int]) -> Tensor:
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts[1:] = torch.tensor(lengths).cumsum(0)
        return starts.to(self.state.pages.device)


def _join(tensors: list[Tensor]) -> Tensor:
    return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).contiguous()


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Exact attention of the last tokens of one request over all of them.

    Args:
        query: [n, num_q_heads, head_dim], of the last n tokens.
        key: [N, num_kv_heads, head_dim], N >= n.
        value: likewise.
        scale: of the dot products.

    Returns:
        [n, num_q_heads, head_dim].
    """
    n, total = query.shape[0], key.shape[0]
    seen = None
    if total > n:
        seen = torch.ones(n, total, dtype=torch.bool, device=query.device).tril(total - n)
    out = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=seen,
        is_causal=seen is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)
