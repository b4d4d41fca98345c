"""The KV cache of one model on one device: prompts and tokens in, attention out.

Knows requests only as slots and no engine at all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffkv.ops import Ops
from diffkv.policies import PAPER, Policy
from diffkv.policy import HIGH, SCORED_QUERIES, Thresholds
from diffkv.prefill import Prefill, torch_prefill
from diffkv.prompts import PromptPath
from diffkv.state import CacheState, PromptTokens
from diffkv.steps import PromptChunk, Step, on_device
from diffkv.turn import Turn

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
        self._places = state.places
        self._device = state.pool.pages.device
        self._turn = Turn(ops, signs)
        self._prompts = PromptPath(state, ops, scale, policy, prefill, self._turn)

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
        self._turn.back(query)
        key = self._turn.there(key)
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
            ValueError: the slot is not empty, or alpha_low is above 0 and the layout does not drop.
        """
        if slot in self._prompts:
            raise ValueError(f"slot {slot} already has a request")
        if not self._policy.uses_thresholds:
            thresholds = Thresholds()
        if thresholds.alpha_low > 0 and not self.state.pool.layout.drops:
            raise ValueError(f"alpha_low must be 0 without drops, got {thresholds.alpha_low}")
        self._prompts.open(slot, thresholds, max_pages)
        shared = self.state.pool
        shared.prompt_lens[slot] = prompt_len
        shared.thresholds[slot, 0] = thresholds.alpha_high
        shared.thresholds[slot, 1] = thresholds.alpha_low

    def close(self, slots: Sequence[int]) -> None:
        """End requests: all their pages are free again."""
        if not slots:
            return
        for slot in slots:
            self._prompts.close(slot)
        for group in self.state.groups:
            self._ops.release(group, self._slot_tensor(slots), -1)

    def compresses(self, chunk: PromptChunk) -> bool:
        """Whether a prompt's tokens are sorted into tiers with this chunk, in any layer."""
        return self._prompts.compresses(chunk)

    def range_problem(self) -> str | None:
        """What the formats cannot hold of the first prompts, in a line, or None; once, after a step."""
        return self._prompts.value_range.problem()

    def gave_up(self, slot: int) -> bool:
        """Whether a request's prompt needed more pages than it may take."""
        return self._prompts.gave_up(slot)

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
        return Step(self._prompts.described(prompts) if prompts else None, decode_rows, plans)

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
            self._prompts.attend(layer, step.prompts, query, key, value, output)
        if step.plans:
            rows = step.decode_rows
            self._attend_generated(layer, step, query[rows], key[rows], value[rows], output)

    def _attend_generated(
        self, layer: int, step: Step, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        number, index = self._places[layer]
        group, plan = self.state.groups[number], step.plans[number]
        query, key, value = (self._turn.there(x).contiguous() for x in (query, key, value))
        self._ops.append(group, index, plan, key, value)
        rows = step.decode_rows
        if isinstance(rows, slice) and output[rows].is_contiguous():
            out = output[rows]
        else:
            out = torch.empty_like(output[rows])
        self._ops.attend(group, index, plan.slots, query, self._scale, out)
        self._turn.back(out)
        if out.data_ptr() != output[rows].data_ptr():
            output[rows] = out

    def _slot_tensor(self, slots: Sequence[int]) -> Tensor:
        return on_device(slots, torch.int32, self._device)
