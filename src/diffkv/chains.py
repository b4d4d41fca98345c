"""The rows of the requests of a cache, and the parts of their prompts that become rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest

from torch import Tensor

from diffkv.packing import RowPlaces, spans_of
from diffkv.policies import Policy
from diffkv.policy import Thresholds
from diffkv.segments import RowEnds
from diffkv.state import PoolState
from diffkv.steps import PromptChunk, PromptPlan
from diffkv.uploads import Place, Uploads, at_once
from diffkv.waves import Part, Wave

__all__ = ["SEEN_BYTES", "Chains"]

SEEN_BYTES = 256 << 20
"""Most bytes of keys and values, as a layer of a model made them, that prompts which go on from stored
tokens see at once; a longer context is seen alone. Attention copies them once more, and so does what
scores a row, keys alone."""


@dataclass
class _Request:
    """A request with an open row.

    Attributes:
        thresholds: as they are with the tiers that there are.
        ends: where closed rows of its prompt end.
        chain: its closed rows.
        starts: where the tokens of each begin, and where those of the open row do.
    """

    thresholds: Thresholds
    ends: RowEnds
    chain: tuple[int, ...] = ()
    starts: tuple[int, ...] = (0,)


class Chains:
    """Knows the rows of each request, here and in the tables of the pool.

    Args:
        state: the pool, whose chains change.
        policy: decides rows.
    """

    def __init__(self, state: PoolState, policy: Policy) -> None:
        self._state = state
        self._policy = policy
        self._device = state.pages.device
        self._requests: dict[int, _Request] = {}

    def __contains__(self, slot: int) -> bool:
        """Whether a slot has a request."""
        return slot in self._requests

    def open(
        self,
        slot: int,
        ends: RowEnds,
        thresholds: Thresholds,
        chain: Sequence[int],
        starts: Sequence[int],
    ) -> None:
        """Begin a request, see `DiffKVCache.open`."""
        tiers = thresholds.for_tiers(self._state.layout.low is not None)
        self._requests[slot] = _Request(tiers, ends)
        self._extend(slot, chain, starts[1:])
        if chain:
            self._write(slot, 0, at_once(self._device)(chain))
        else:
            self._state.chain_lens[slot] = 0

    def ends(self, slot: int) -> RowEnds:
        """Where a request's closed rows end."""
        return self._requests[slot].ends

    def end(self, slot: int) -> None:
        """Forget a request."""
        self._requests.pop(slot, None)

    def decides(self, slot: int) -> bool:
        """Whether a request's prompt is sorted into tiers."""
        return self._policy.decides(self._requests[slot].thresholds)

    def _extend(self, slot: int, rows: Sequence[int], ends: Sequence[int]) -> None:
        """Add closed rows to a request's chain."""
        request, most = self._requests[slot], self._state.chain_width
        num = len(request.chain) + len(rows)
        if num > most:
            raise ValueError(f"a request can have {most} closed rows, got {num}")
        request.chain = (*request.chain, *rows)
        request.starts = (*request.starts, *ends)

    def _write(self, slot: int, before: int, rows: Tensor) -> None:
        """Write what a chain has grown by, [.] int32, into the pool's tables."""
        num = before + rows.numel()
        self._state.chains[slot, before:num] = rows
        self._state.chain_lens[slot] = num

    def plan(self, chunks: Sequence[PromptChunk]) -> PromptPlan:
        """Plan some chunks for all layers; chains grow by the rows that they complete.

        Raises:
            ValueError: a chunk does not name a slot for each row that it completes.
        """
        uploads = Uploads(self._device)
        starts = [0, *accumulate(chunk.num_new for chunk in chunks)]
        before = [len(self._requests[chunk.slot].chain) for chunk in chunks]
        by_chunk = [self._parts(c, s, uploads.add) for c, s in zip(chunks, starts, strict=False)]
        waves = tuple(
            wave
            for some in _by_need(by_chunk)
            for group in self._seen_at_once(some)
            for wave in self._waves(group, uploads.add)
        )
        plan = PromptPlan(spans_of([c.span for c in chunks], uploads.add), waves)
        grown = [
            (chunk.slot, num, uploads.add(chunk.closing))
            for chunk, num in zip(chunks, before, strict=True)
            if chunk.closing
        ]
        uploads.send()
        for slot, num, rows in grown:
            self._write(slot, num, rows)
        return plan

    def _waves(self, group: list[list[Part]], place: Place) -> Iterator[Wave]:
        """The parts of some chunks: the first ones of all, then the second ones, and so on."""
        seen = None
        for parts in zip_longest(*group):
            some = [part for part in parts if part is not None]
            wave = Wave.of(some, seen, self._policy, self._state, place)
            seen = seen or wave.before or wave.after
            yield wave

    def _seen_at_once(self, by_chunk: Sequence[list[Part]]) -> list[list[list[Part]]]:
        """Put chunks together, by their parts, so that what they see is in memory at once."""
        state = self._state
        token_bytes = 2 * state.num_kv_heads * state.layout.head_dim * state.dtype.itemsize
        groups: list[list[list[Part]]] = [[]]
        room = most = SEEN_BYTES // token_bytes
        for parts in by_chunk:
            num = parts[-1].end if parts[-1].first else 0  # else a chunk sees itself alone
            if groups[-1] and num > room:
                groups.append([])
                room = most
            groups[-1].append(parts)
            room -= num
        return groups

    def _parts(self, chunk: PromptChunk, offset: int, place: Place) -> list[Part]:
        """A chunk's parts; `offset` is where its tokens are among those of the plan."""
        request, parts = self._requests[chunk.slot], []
        bounds = request.ends.cuts(request.starts[-1], chunk.num_stored, chunk.end)
        if sum(closes for *_, closes in bounds) != len(chunk.closing):
            raise ValueError(
                f"the rows {chunk.closing} are not as many as are complete in {bounds}"
            )
        closing = iter(chunk.closing)
        for first, stop, closes in bounds:
            is_last = stop == chunk.prompt_len
            open_target = chunk.slot if is_last else None
            target = next(closing) if closes else open_target
            parts.append(self._part(chunk, offset - chunk.num_stored, first, stop, target, place))
            if closes and target is not None:
                self._extend(chunk.slot, [target], [stop])
        return parts

    def _part(
        self,
        chunk: PromptChunk,
        offset: int,
        first: int,
        stop: int,
        target: int | None,
        place: Place,
    ) -> Part:
        request = self._requests[chunk.slot]
        start = request.starts[-1]
        row_end = request.ends.after(start) or chunk.prompt_len
        # What begins with its chunk is seen by way of `Sight.after`
        stored = [target] if first and target is not None and stop < chunk.end else []
        return Part(
            slot=chunk.slot,
            chain=request.chain,
            starts=request.starts,
            first=first,
            stop=stop,
            end=chunk.end,
            row_end=row_end,
            target=target,
            is_last=stop == chunk.prompt_len,
            thresholds=request.thresholds if self.decides(chunk.slot) else None,
            rows=slice(offset + first, offset + stop),
            stored=RowPlaces.of(stored, [start], stop, place),
        )


def _by_need(by_chunk: Sequence[list[Part]]) -> list[list[list[Part]]]:
    """Put chunks together that need none of each other's rows, each after those whose rows it needs.

    What goes on from a row that another chunk closes comes after that one. What begins comes first, and
    apart from what goes on.
    """
    closed_by = {
        part.target: parts
        for parts in by_chunk
        for part in parts
        if part.target is not None and part.target != part.slot
    }
    ranks: dict[int, int] = {}

    def rank(parts: list[Part]) -> int:
        first = parts[0]
        if first.slot not in ranks:
            needed = [closed_by[slot] for slot in first.chain if slot in closed_by]
            ranks[first.slot] = max([int(first.first > 0), *(1 + rank(other) for other in needed)])
        return ranks[first.slot]

    found: dict[int, list[list[Part]]] = {}
    for parts in by_chunk:
        found.setdefault(rank(parts), []).append(parts)
    return [found[each] for each in sorted(found)]
