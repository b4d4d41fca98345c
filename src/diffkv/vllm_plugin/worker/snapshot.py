"""The state of a pool after a step, copied to the host without making it wait."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffkv.cache import DiffKVCache
from diffkv.segments import RowEnds
from diffkv.uploads import on_device
from diffkv.vllm_plugin.messages import MAX_IN_FLIGHT, PagesHeld, StepMessage

__all__ = ["Moment", "RunningRequest", "Snapshot", "Snapshots"]

COLUMNS = 3 + MAX_IN_FLIGHT
"""Of what `reference.report` writes."""


@dataclass
class RunningRequest:
    """A running request.

    Attributes:
        slot: slot of its open row.
        block_id: the vLLM block that identifies it.
        ends: where the closed rows of its prompt end.
        epoch: the admission of the request that this is.
        chain: slots of its closed rows.
        start: tokens of those, after which the open row begins.
        num_tokens: tokens of it that its rows cover after the current step.
    """

    slot: int
    block_id: int
    ends: RowEnds
    epoch: int
    chain: tuple[int, ...]
    start: int
    num_tokens: int

    @property
    def rows(self) -> list[int]:
        """Slots of all of its rows."""
        return [*self.chain, self.slot]


@dataclass(frozen=True)
class Moment:
    """What the host knows of a step when it is over.

    Attributes:
        message: the scheduler's, from before it.
        requests: the step's requests, by name; their slots and epochs are for good.
        ended: requests that ended just before it.
        num_requests: requests that were running, in the step or not.
        num_rows: rows that there were, closed ones included.
        num_tokens: tokens of all rows, each counted once.
    """

    message: StepMessage
    requests: Mapping[str, RunningRequest]
    ended: Sequence[RunningRequest]
    num_requests: int
    num_rows: int
    num_tokens: int


@dataclass(frozen=True)
class Snapshot:
    """The pool after a step.

    Attributes:
        moment: the step.
        slots: rows that it has changed: the open ones of its requests, then those that it closed.
        numbers: [1 + len(slots), COLUMNS] int64, see `reference.report`.
    """

    moment: Moment
    slots: Sequence[int]
    numbers: np.ndarray

    @property
    def overruns(self) -> int:
        """Plans that wanted more pages than were free."""
        return int(self.numbers[0, 0])

    @property
    def num_free(self) -> int:
        """Free pages."""
        return int(self.numbers[0, 1])

    @property
    def demotions(self) -> int:
        """Tokens that went from high to low in decode steps, since the start."""
        return int(self.numbers[0, 2])

    def reports(self) -> dict[str, PagesHeld]:
        """The step's requests, as the scheduler is told of them."""
        moment, rows = self.moment, self.numbers[1:].tolist()
        num_tokens, closing = moment.message.num_tokens, moment.message.closing
        reports = {
            name: PagesHeld(held, tuple(growth), num_tokens[name], request.epoch)
            for (name, request), (held, _, _, *growth) in zip(
                moment.requests.items(), rows, strict=False
            )
        }
        closed = iter(rows[len(reports) :])
        for name, slots in closing.items():
            held = {slot: next(closed)[0] for slot in slots}
            reports[name] = reports[name]._replace(closed=held)
        return reports


@dataclass(frozen=True)
class _Buffer:
    """Where numbers are written, and where the host reads them.

    Attributes:
        numbers: [capacity, COLUMNS] int64, on the device.
        host: the same numbers, in pinned memory, once `copied` has happened; on a CPU the same tensor.
        array: likewise.
        copied: a CUDA event; None where nothing has to be copied.
    """

    numbers: Tensor
    host: Tensor
    array: np.ndarray
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, capacity: int, device: torch.device) -> "_Buffer":
        """For so many rows."""
        shape = capacity, COLUMNS
        numbers = torch.empty(shape, dtype=torch.int64, device=device)
        if device.type != "cuda":
            return cls(numbers, numbers, numbers.numpy(), None)
        host = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        # who waits sleeps, as vLLM's own waits do: a core is not spent on it
        return cls(numbers, host, host.numpy(), torch.cuda.Event(blocking=True))


class Snapshots:
    """Takes them, and gives each out: at once, or one step late.

    Args:
        cache: the pool's, which is only read.
        late: give a snapshot out after the next one was taken, while requests run. Then the device is
            never waited for while it has nothing to do; who reads a report must bound one more step.
    """

    def __init__(self, cache: DiffKVCache, late: bool) -> None:
        self._cache = cache
        self._late = late
        self._device = cache.state.pages.device
        self._taken: deque[tuple[Moment, list[int], _Buffer]] = deque()
        self._unused: list[_Buffer] = []
        self._slots: list[int] = []
        self._slots_there = on_device([], torch.int32, self._device)
        self._unused.append(self._begin([]))  # compiled before the first step

    def take(self, moment: Moment) -> None:
        """Begin to copy what the pool holds now."""
        slots = [request.slot for request in moment.requests.values()]
        for closed in moment.message.closing.values():
            slots += closed
        self._taken.append((moment, slots, self._begin(slots)))

    def _begin(self, slots: list[int]) -> _Buffer:
        if slots != self._slots:  # as a rule they are those of the step before
            self._slots = slots
            self._slots_there = on_device(slots, torch.int32, self._device)
        num, buffer = 1 + len(slots), self._buffer(1 + len(slots))
        self._cache.report(self._slots_there, buffer.numbers[:num])
        if buffer.copied is not None:
            buffer.host[:num].copy_(buffer.numbers[:num], non_blocking=True)
            buffer.copied.record()
        return buffer

    def _buffer(self, num: int) -> _Buffer:
        """One that nobody reads; those that are too small are given up."""
        while self._unused:
            buffer = self._unused.pop()
            if len(buffer.array) >= num:
                return buffer
        return _Buffer.of(1 << num.bit_length(), self._device)

    def give(self, settle: bool = False) -> list[Snapshot]:
        """Those that are due, in their order; asked after each `take`.

        After the last request none waits for another step.

        Args:
            settle: give all that were taken.
        """
        one_waits = self._late and not settle and self._taken[-1][0].num_requests > 0
        due = []
        while len(self._taken) > one_waits:
            moment, slots, buffer = self._taken.popleft()
            if buffer.copied is not None:
                buffer.copied.synchronize()
            due.append(Snapshot(moment, slots, buffer.array[: 1 + len(slots)].copy()))
            self._unused.append(buffer)
        return due
