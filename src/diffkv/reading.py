"""What attention of prompts sees of earlier tokens: closed rows as they are stored, others exactly.

Everything is as the model makes it: what is rotated in pages is turned back when it is read.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffkv.ops import Ops
from diffkv.packing import RowPlaces
from diffkv.policy import DROPPED, HIGH
from diffkv.prefill import Prefill, Spans
from diffkv.rotator import Rotator
from diffkv.state import PoolState
from diffkv.uploads import at_once
from diffkv.waves import Part, Sight

__all__ = ["HeadPacking", "Reader", "Seen"]


class Reader:
    """Reads rows of a pool back, as the model made their keys and values.

    Args:
        state: the pool.
        ops: the kernels.
        rotator: has rotated what is in rows that are complete.

    Attributes:
        exact: the pool for rows that wait (`PoolState.exact`); nothing in them is rotated.
    """

    def __init__(self, state: PoolState, ops: Ops, rotator: Rotator) -> None:
        self._state, self._ops, self._rotator = state, ops, rotator
        self.exact = state.exact()

    def read(self, layer: int, rows: RowPlaces, pairs: Tensor, waits: bool = False) -> Tensor:
        """Read rows to their places among tokens that are seen.

        Args:
            layer: number of the layer.
            rows: the rows.
            pairs: [tokens, 2, num_kv_heads, head_dim], keys and values that are seen; changes.
            waits: whether the rows' tokens wait.

        Returns:
            [num_kv_heads, tokens of the rows] int8, the tiers: DROPPED where there is nothing.
        """
        places = pairs[rows.span]
        tiers = torch.empty(places.shape[2], places.shape[0], dtype=torch.int8, device=pairs.device)
        state, (key, value) = self.exact if waits else self._state, places.unbind(1)
        self._ops.gather(state, layer, rows.slots, rows.starts, key, value, tiers)
        if not waits:
            self._rotator.unrotate(places.flatten(1, 2))
        return tiers


class Seen:
    """Keys and values of one layer of one request, up to the end of its chunk.

    Args:
        reader: reads the request's rows.
        layer: number of the layer.
        pairs: [end of the chunk, 2, num_kv_heads, head_dim].
        tiers: [num_kv_heads, end of the chunk] int8; None where all heads keep the same.
        together: keys and values of all requests that are seen with it, one after the other.

    Attributes:
        key: [end of the chunk, num_kv_heads, head_dim], the model's dtype; rows are apart.
        value: likewise.
        together: as given.
    """

    def __init__(
        self,
        reader: Reader,
        layer: int,
        pairs: Tensor,
        tiers: Tensor | None,
        together: tuple[Tensor, Tensor],
    ) -> None:
        self._reader, self._layer, self._pairs, self._tiers = reader, layer, pairs, tiers
        self.key, self.value = pairs.unbind(1)
        self.together = together
        self._by_head: HeadPacking | None = None

    @classmethod
    def of(
        cls, reader: Reader, layer: int, sight: Sight, key: Tensor, value: Tensor, drops: bool
    ) -> dict[int, "Seen"]:
        """What the requests of a sight see, by slot.

        Args:
            reader: reads their rows.
            layer: number of the layer.
            sight: what they see.
            key: [tokens, num_kv_heads, head_dim] of all chunks of the step.
            value: likewise.
            drops: whether heads may keep different tokens.
        """
        _, heads, head_dim = key.shape
        # Side by side, so that both are turned back at once
        pairs = key.new_empty(sight.starts[-1], 2, heads, head_dim)
        keys, values = pairs.unbind(1)
        tiers = None
        if drops:
            tiers = torch.full((heads, len(pairs)), HIGH, dtype=torch.int8, device=key.device)
        if sight.closed is not None:
            kept = reader.read(layer, sight.closed, pairs)
            if tiers is not None:
                tiers[:, sight.closed.span] = kept
        # After rows that are complete: what is between these has been written too
        for rows in sight.waited:
            reader.read(layer, rows, pairs, waits=True)
        keys[sight.places], values[sight.places] = key[sight.own], value[sight.own]
        if tiers is not None:
            for places in (*(rows.span for rows in sight.waited), sight.places):
                tiers[:, places] = HIGH
        seen = {}
        for part, (start, end) in zip(sight.parts, pairwise(sight.starts), strict=True):
            own_tiers = None if tiers is None else tiers[:, start:end]
            seen[part.slot] = cls(reader, layer, pairs[start:end], own_tiers, (keys, values))
        return seen

    def close(self, part: Part) -> None:
        """From here on the row that a part has completed is seen as it is stored."""
        assert part.stored is not None, "the row is not complete, or nothing follows"
        tiers = self._reader.read(self._layer, part.stored, self._pairs)
        if self._tiers is not None:
            self._tiers[:, part.stored.span] = tiers
        self._by_head = None

    def kept(self, part: Part) -> Tensor:
        """[num_kv_heads, part.stop] bool: what each head keeps, the part and its segment included."""
        assert self._tiers is not None, "every head keeps the same"
        kept = self._tiers[:, : part.stop] != DROPPED
        kept[:, part.start :] = True
        return kept

    def by_head(self, part: Part) -> "HeadPacking":
        """A part, each head a sequence of its own; made once."""
        if self._by_head is None:
            self._by_head = HeadPacking.of(part, self)
        return self._by_head


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
        kept = seen.kept(part)
        key, value = (x[: part.stop].transpose(0, 1)[kept][:, None] for x in (seen.key, seen.value))
        return cls(key, value, tuple(kept.sum(1).tolist()))

    def attend(self, prefill: Prefill, query: Tensor, scale: float, output: Tensor) -> None:
        """`Prefill` of one part: query and output are [tokens, num_q_heads, head_dim]."""
        heads, num = len(self.counts), len(query)
        spans = Spans.of([num] * heads, self.counts, at_once(query.device))
        queries = self.by_head(query)
        attended = torch.empty_like(queries)
        prefill(queries, self.key, self.value, spans, scale, attended)
        per_head = attended.view(heads, num, -1, query.shape[2])
        output.copy_(per_head.transpose(0, 1).flatten(1, 2))

    def significance(
        self, ops: Ops, part: Part, query: Tensor, scale: float, max_queries: int
    ) -> Tensor:
        """[num_kv_heads, part.length]: sums of the part's row, see `reference.significance`."""
        heads, num, place = len(self.counts), len(query), at_once(query.device)
        spans, length = Spans.of([num] * heads, self.counts, place), part.length
        own = place(range(0, (heads + 1) * length, length))
        starts = spans.query_starts, spans.key_starts, own
        sums = ops.significance(
            self.by_head(query), self.key, *starts, heads * length, scale, max_queries
        )
        return sums.view(heads, length)

    def by_head(self, query: Tensor) -> Tensor:
        """[num_kv_heads * tokens, query heads of one, head_dim] of [tokens, num_q_heads, head_dim]."""
        heads = len(self.counts)
        return query.unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 1).contiguous()
