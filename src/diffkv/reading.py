"""What attention of prompts sees of earlier tokens: closed rows as they are stored, others exactly.

Everything is rotated, as it is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffkv.ops import Ops
from diffkv.packing import RowPlaces, on_device
from diffkv.policy import DROPPED, HIGH
from diffkv.prefill import Prefill, Spans
from diffkv.state import PoolState
from diffkv.steps import Part

__all__ = ["HeadPacking", "Seen"]


class Seen:
    """Keys and values of one layer of one request, up to the end of its chunk.

    Args:
        state: the pool.
        exact: the same for rows that wait (`PoolState.exact`).
        ops: the kernels.
        layer: number of the layer.
        part: first part of the chunk that asks.

    Attributes:
        key: [part.end, num_kv_heads, head_dim], the model's dtype.
        value: likewise.
        tiers: [num_kv_heads, part.end] int8: DROPPED where there is nothing.
    """

    def __init__(
        self, state: PoolState, exact: PoolState, ops: Ops, layer: int, part: Part
    ) -> None:
        self._state, self._ops, self._layer = state, ops, layer
        shape = (part.end, state.num_kv_heads, state.layout.head_dim)
        device = state.pages.device
        self.key = torch.empty(shape, dtype=state.dtype, device=device)
        self.value = torch.empty_like(self.key)
        self.tiers = torch.full(shape[1::-1], HIGH, dtype=torch.int8, device=device)
        self._by_head: HeadPacking | None = None
        if part.closed is not None:
            self._read(state, part.closed)
        if part.waited is not None:
            self._read(exact, part.waited)

    def _read(self, state: PoolState, rows: RowPlaces) -> None:
        """Read rows to the places where they are in the request."""
        span, heads = rows.span, len(self.tiers)
        tiers = self.tiers.new_empty(heads, span.stop - span.start)
        self._ops.gather(
            state,
            self._layer,
            rows.slots,
            rows.starts,
            self.key[span],
            self.value[span],
            tiers,
        )
        self.tiers[:, span] = tiers

    def add(self, part: Part, key: Tensor, value: Tensor) -> None:
        """Add a part's own tokens: [tokens, num_kv_heads, head_dim], rotated."""
        self.key[part.first : part.stop] = key
        self.value[part.first : part.stop] = value
        self._by_head = None

    def by_head(self, part: Part) -> "HeadPacking":
        """A part that was added, each head a sequence of its own; made once."""
        if self._by_head is None:
            self._by_head = HeadPacking.of(part, self)
        return self._by_head

    def close(self, part: Part) -> None:
        """From here on the row that a part has completed is seen as it is stored."""
        assert part.stored is not None, "the row is not complete, or nothing follows"
        self._read(self._state, part.stored)


@dataclass(frozen=True)
class HeadPacking:
    """A part of a request whose heads keep different tokens: each head is a sequence of its own.

    Attributes:
        key: [tokens that all heads keep, 1, head_dim].
        value: likewise.
        counts: tokens that each head keeps, those of the part included.
    """

    key: Tensor
    value: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, part: Part, seen: Seen) -> "HeadPacking":
        """Pack what each head keeps. Waits for the device."""
        kept = seen.tiers[:, : part.stop] != DROPPED
        kept[:, part.start :] = True
        key, value = (x[: part.stop].transpose(0, 1)[kept][:, None] for x in (seen.key, seen.value))
        return cls(key, value, tuple(kept.sum(1).tolist()))

    def attend(self, prefill: Prefill, query: Tensor, scale: float, output: Tensor) -> None:
        """`Prefill` of one part: query and output are [tokens, num_q_heads, head_dim]."""
        heads, num = len(self.counts), len(query)
        spans = Spans.of([num] * heads, self.counts, query.device)
        queries = self.by_head(query)
        attended = torch.empty_like(queries)
        prefill(queries, self.key, self.value, spans, scale, attended)
        per_head = attended.view(heads, num, -1, query.shape[2])
        output.copy_(per_head.transpose(0, 1).flatten(1, 2))

    def significance(
        self, ops: Ops, part: Part, query: Tensor, scale: float, max_queries: int
    ) -> Tensor:
        """[num_kv_heads, part.length]: sums of the part's row, see `reference.significance`."""
        heads, num, device = len(self.counts), len(query), query.device
        spans, length = Spans.of([num] * heads, self.counts, device), part.length
        own = on_device(range(0, (heads + 1) * length, length), torch.int32, device)
        starts = spans.query_starts, spans.key_starts, own
        sums = ops.significance(
            self.by_head(query), self.key, *starts, heads * length, scale, max_queries
        )
        return sums.view(heads, length)

    def by_head(self, query: Tensor) -> Tensor:
        """[num_kv_heads * tokens, query heads of one, head_dim] of [tokens, num_q_heads, head_dim]."""
        heads = len(self.counts)
        return query.unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 1).contiguous()
