"""The state of a pool after a step, copied to the host without making it wait."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffkv import pool
from diffkv.segments import RowEnds
from diffkv.state import PoolState
from diffkv.vllm_plugin.messages import MAX_IN_FLIGHT, PagesHeld

__all__ = ["RunningRequest", "Snapshot", "Snapshots"]

NUM_TOTALS = 6
"""Overruns, head and tail of the ring, tokens high and low, demotions since the start."""


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
        closing: slots of the rows that the current step closes, the last ones of the chain.
        failed: whether it is too large for the whole pool, so that the current step stores nothing.
    """

    slot: int
    block_id: int
    ends: RowEnds
    epoch: int
    chain: tuple[int, ...] = ()
    start: int = 0
    num_tokens: int = 0
    closing: tuple[int, ...] = ()
    failed: bool = False

    @property
    def rows(self) -> list[int]:
        """Slots of all of its rows."""
        return [*self.chain, self.slot]

    @property
    def is_prompt(self) -> bool:
        """Whether the current step is part of its prompt."""
        return self.num_tokens <= self.ends.prompt_len


@dataclass(frozen=True)
class Snapshot:
    """The pool after a step.

    Attributes:
        requests: the step's requests, as they were after it.
        num_requests: requests that were running, in the step or not.
        num_rows: rows that there were, closed ones included.
        num_tokens: tokens of all rows, each counted once.
        numbers: [NUM_TOTALS + R * (1 + MAX_IN_FLIGHT) + C] int64 on the host, once `copied` has
            happened; C rows were closed.
        copied: a CUDA event; None where nothing had to be copied.
    """

    requests: Mapping[str, RunningRequest]
    num_requests: int
    num_rows: int
    num_tokens: int
    numbers: Tensor
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        """Until the numbers are there."""
        if self.copied is not None:
            self.copied.synchronize()

    @property
    def overruns(self) -> int:
        """Plans that wanted more pages than were free."""
        return int(self.numbers[0])

    @property
    def num_free(self) -> int:
        """Free pages."""
        return int(self.numbers[2] - self.numbers[1])

    @property
    def kept(self) -> tuple[int, int]:
        """Tokens (high, low) over all layers and heads."""
        return int(self.numbers[3]), int(self.numbers[4])

    @property
    def demotions(self) -> int:
        """Tokens that went from high to low in decode steps, since the start."""
        return int(self.numbers[5])

    def reports(self) -> dict[str, PagesHeld]:
        """The step's requests, as the scheduler is told of them."""
        end = NUM_TOTALS + len(self.requests) * (1 + MAX_IN_FLIGHT)
        rows = self.numbers[NUM_TOTALS:end].view(-1, 1 + MAX_IN_FLIGHT).tolist()
        closed = iter(self.numbers[end:].tolist())
        return {
            name: PagesHeld(
                held,
                tuple(growth),
                request.num_tokens,
                request.epoch,
                {slot: next(closed) for slot in request.closing},
            )
            for (name, request), (held, *growth) in zip(self.requests.items(), rows, strict=True)
        }


class Snapshots:
    """Takes them, and gives each out: at once, or one step late.

    Args:
        state: the pool's, which is only read.
        late: give a snapshot out after the next one was taken, while requests run. Then the device is
            never waited for while it has nothing to do; who reads a report must bound one more step.
    """

    def __init__(self, state: PoolState, late: bool) -> None:
        self._state = state
        self._late = late
        self._taken: deque[Snapshot] = deque()
        self._demotions = torch.zeros(1, dtype=torch.int64, device=state.pages.device)

    def count_demotions(self, places: Tensor) -> None:
        """Add a step's: `places` of its DecodePlan."""
        self._demotions += (places[..., 2] >= 0).sum()

    def take(
        self,
        requests: Mapping[str, RunningRequest],
        num_requests: int,
        num_rows: int,
        num_tokens: int,
    ) -> None:
        """Begin to copy what the pool holds now."""
        state, device = self._state, self._demotions.device
        opened = [r.slot for r in requests.values()]
        closed = [slot for r in requests.values() for slot in r.closing]
        slots = torch.tensor(opened + closed, dtype=torch.int64).to(device, non_blocking=True)
        held = pool.held_pages(state, slots)
        growth = pool.page_growth(state, slots[: len(opened)], MAX_IN_FLIGHT)
        kept = state.num_tokens.sum((0, 1, 2))
        numbers = torch.cat(
            [
                state.overruns.long(),
                state.ring_ends,
                kept,
                self._demotions,
                torch.cat([held[: len(opened), None], growth], 1).flatten(),
                held[len(opened) :],
            ]
        )
        copied = None
        if device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        then = {name: replace(request) for name, request in requests.items()}
        self._taken.append(Snapshot(then, num_requests, num_rows, num_tokens, numbers, copied))

    def give(self) -> list[Snapshot]:
        """Those that are due, in their order; asked after each `take`.

        After the last request none waits for another step.
        """
        one_waits = self._late and self._taken[-1].num_requests > 0
        due = []
        while len(self._taken) > one_waits:
            due.append(self._taken.popleft())
            due[-1].wait()
        return due
