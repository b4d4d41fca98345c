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
from diffkv.quant import ConfigError
from diffkv.rotator import Rotator
from diffkv.segments import RowEnds
from diffkv.state import DecodePlan, NewTokens, PoolState, PromptTokens
from diffkv.steps import Passing, PromptChunk, Step
from diffkv.uploads import at_once, on_device

__all__ = ["DiffKVCache", "PromptChunk", "Step"]


class DiffKVCache:
    """Stores, decides and attends, for every layer of one model.

    Args:
        state: the pool.
        ops: the kernels, as `diffkv.ops.load` returns them.
        scale: softmax scale.
        policy: decides the tiers of prompts.
        prefill: exact attention of prompts.
        segment: tokens after which a prompt is decided and its row closed; 0: prompts are decided whole.
        signs: signs of the rotation that spreads outliers of queries, keys and values
            (`diffkv.rotation`); None for none.
    """

    def __init__(
        self,
        state: PoolState,
        ops: Ops,
        scale: float,
        policy: Policy = PAPER,
        prefill: Prefill = torch_prefill,
        signs: Tensor | None = None,
        segment: int = 0,
    ) -> None:
        self.state = state
        self._ops = ops
        self._scale = scale
        self._policy = policy
        self._prefill = prefill
        self._segment = segment
        self._device = state.pages.device
        self._rotator = Rotator(ops, signs)
        self._prompts = PromptPath(state, ops, scale, policy, prefill, self._rotator)

    def warm_up(self, num_q_heads: int, num_requests: int = 1) -> None:
        """Run every operation on nothing, so that nothing is compiled or made while requests run.

        Args:
            num_q_heads: query heads of a layer, on this rank.
            num_requests: most that decode at once, for which scratch memory is made.

        Raises:
            ConfigError: there is no room for it.
        """
        nobody, one = self._slot_tensor([-1]), on_device([0, 1], torch.int32, self._device)
        state, device, dtype = self.state, self._device, self.state.dtype
        shape = (state.num_kv_heads, state.layout.head_dim)
        key = torch.zeros(1, *shape, dtype=dtype, device=device)
        query = torch.zeros(1, num_q_heads, shape[1], dtype=dtype, device=device)
        key = self._rotator.rotate(key)
        self._rotator.unrotate(key.repeat(1, 2, 1))  # keys and values, as they are read back
        starts = one, one, one
        for lse in (None, torch.zeros(num_q_heads, 1, device=device)):
            scored = query, key, *starts, 1, self._scale, SCORED_QUERIES
            sums = self._ops.significance(*scored, lse)
        tiers = torch.full(sums.shape, HIGH, dtype=torch.int8, device=device)
        none = torch.zeros_like(nobody)
        for bounds in (None, torch.zeros(1, 2, device=device)):
            self._ops.decide_rows(sums, one, bounds, none, state.window, SCORED_QUERIES, tiers)
        if state.centre_dim:
            unnamed = self._slot_tensor([0, 0, 0, -1])[None]  # slot 0 takes its own centre
            self._ops.centre_rows(state, 0, unnamed, one, key)
        tokens = PromptTokens(nobody, one, key, key, torch.zeros_like(nobody))
        self._ops.store_prompt(state, 0, tokens, tiers, sums)
        num = min(num_requests, state.num_slots)
        while num > 0:  # kernels may differ by the size of a batch; the largest makes the memory
            self._decode_nobody(query, key, num)
            num //= 2
        self._ops.store_prompt(self._prompts.exact, 0, tokens, tiers, sums)
        for each in (state, self._prompts.exact):
            first = self._slot_tensor([0])
            self._ops.gather(each, 0, first, first, key, torch.empty_like(key), tiers.clone())
        self._ops.release(state, nobody, -1)

    def _decode_nobody(self, query: Tensor, key: Tensor, num_requests: int) -> None:
        """A decode step of so many requests that are not there, whose one query and key are given."""
        try:
            slots = self._slot_tensor([-1] * num_requests)
            query, key = (each.repeat(num_requests, 1, 1) for each in (query, key))
            plan = self._ops.plan_decode(self.state, slots, torch.ones_like(slots))
            out, new = torch.empty_like(query), NewTokens(plan, key, key)
            self._ops.attend(
                self.state, 0, slots, query, self._scale, out, self._rotator.signs, new
            )
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"no memory is left for attention over {num_requests} requests at once: lower "
                f"max_num_seqs, gpu_memory_utilization or the KV budget"
            ) from None

    def open(
        self,
        slot: int,
        prompt_len: int,
        thresholds: Thresholds,
        chain: Sequence[int] = (),
        starts: Sequence[int] = (0,),
        message: int = 0,
    ) -> None:
        """Begin a request in an empty slot. A policy without thresholds lets go of them.

        Args:
            slot: slot of its open row.
            prompt_len: tokens of the prompt, those of closed rows included.
            thresholds: the request's thresholds.
            chain: closed rows that hold its first tokens.
            starts: where the tokens of each of them begin, and where the open row's do.
            message: end of the prompt's first message, see `segments.first_message`; 0: there is none.

        Raises:
            ValueError: the slot is not empty, or alpha_low is above 0 and the layout does not drop.
        """
        if slot in self._prompts:
            raise ValueError(f"slot {slot} already has a request")
        if not self._policy.uses_thresholds:
            thresholds = Thresholds()
        if thresholds.drops and not self.state.layout.drops:
            raise ValueError(f"alpha_low must be 0 without drops, got {thresholds.alpha_low}")
        ends = RowEnds(self._segment, prompt_len, message, thresholds.drops)
        self._prompts.chains.open(slot, ends, thresholds, chain, starts)
        self.state.prompt_lens[slot] = prompt_len
        self.state.thresholds[slot, 0] = thresholds.alpha_high
        self.state.thresholds[slot, 1] = thresholds.alpha_low

    def ends(self, slot: int) -> RowEnds:
        """Where the closed rows of the request at a slot end."""
        return self._prompts.chains.ends(slot)

    def end(self, slots: Sequence[int]) -> None:
        """End requests; their rows stay as they are until they are released."""
        for slot in slots:
            self._prompts.end(slot)

    def release(self, slots: Sequence[int]) -> None:
        """Give up rows, closed ones or those of requests that ended: all their pages are free again."""
        if not slots:
            return
        self.end(slots)
        self._ops.release(self.state, self._slot_tensor(slots), -1)

    def compresses(self, chunk: PromptChunk) -> bool:
        """Whether a prompt's tokens are sorted into tiers with this chunk."""
        return self._prompts.compresses(chunk)

    def range_problem(self) -> str | None:
        """What the formats cannot hold of the first prompts, in a line, or None; once, after a step."""
        return self._prompts.value_range.problem()

    def report(self, slots: Tensor, numbers: Tensor) -> None:
        """What the pool holds, and some of its rows: `reference.report`."""
        self._ops.report(self.state, slots, numbers)

    def plan(
        self,
        prompts: Sequence[PromptChunk],
        decode_rows: slice | Tensor,
        slots: Tensor,
        seq_lens: Tensor,
        passing: Sequence[slice] = (),
    ) -> Step:
        """Plan a step: decide for all layers what the generated tokens replace.

        Args:
            prompts: chunks of prompts in this step; of those that complete segments, the closed rows
                are part of their requests' chains from here on.
            decode_rows: rows of the batch that are generated tokens.
            slots: [R] int32, request of each of those rows; -1 for padding.
            seq_lens: [R] int32, tokens of each request with the new one.
            passing: spans of the batch whose tokens attend to each other and are not stored.
        """
        return Step(
            self._prompts.plan(prompts) if prompts else None,
            decode_rows,
            self._ops.plan_decode(self.state, slots, seq_lens) if slots.numel() else None,
            Passing.of(passing, at_once(self._device)) if passing else None,
        )

    def attend(
        self, layer: int, step: Step, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        """One layer of a step: store its keys and values, and attend.

        Args:
            layer: number of the layer.
            step: the plan of this step.
            query: [num_rows, num_q_heads, head_dim], packed batch, rotary embedding applied.
            key: [num_rows, num_kv_heads, head_dim].
            value: [num_rows, num_kv_heads, head_dim].
            output: [num_rows, num_q_heads, head_dim], written for the step's rows.
        """
        if step.prompts is not None:
            self._prompts.attend(layer, step.prompts, query, key, value, output)
        if step.decode is not None:
            self._attend_generated(
                layer, step.decode, step.decode_rows, (query, key, value), output
            )
        if step.passing is not None:
            rows, spans = step.passing.rows, step.passing.spans
            out = torch.empty_like(query[rows])
            self._prefill(query[rows], key[rows], value[rows], spans, self._scale, out)
            output[rows] = out

    def _attend_generated(
        self,
        layer: int,
        plan: DecodePlan,
        rows: slice | Tensor,
        vectors: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
    ) -> None:
        query, key, value = (x[rows] for x in vectors)
        if isinstance(rows, slice) and output[rows].is_contiguous():
            out = output[rows]
        else:
            out = torch.empty_like(output[rows])
        self._ops.attend(
            self.state,
            layer,
            plan.slots,
            query,
            self._scale,
            out,
            self._rotator.signs,
            NewTokens(plan, key, value),
        )
        if out.data_ptr() != output[rows].data_ptr():
            output[rows] = out

    def _slot_tensor(self, slots: Sequence[int]) -> Tensor:
        return on_device(slots, torch.int32, self._device)
