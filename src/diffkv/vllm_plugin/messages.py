"""The messages between scheduler and workers: everything that crosses from one process to the other.

Down, before a step: which rows are gone, which requests ended and which start, and where the rows go
that are closed in it. Up, after it: the pages of the rows that changed. Figures for /metrics go up
beside these, see `metrics.DiffKVStats`.

A slot is where the tables of a row are, on every rank. The scheduler hands slots out, and a worker does
what it is told with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from diffkv.policy import Thresholds

__all__ = ["MAX_IN_FLIGHT", "PagesHeld", "ReportMessage", "Started", "StepMessage"]

MAX_IN_FLIGHT = 4
"""Generated tokens that a report may be behind: with asynchronous scheduling it lags by two steps, and
a worker that does not wait for its device adds one."""

_NONE: Mapping[int, int] = {}


@dataclass(frozen=True)
class Started:
    """A request that the scheduler admits, or resumes after a preemption.

    Attributes:
        request_id: vLLM's name of it.
        block_id: the block that is the request's identity in block tables.
        slot: slot of its open row, which is empty.
        chain: slots of the closed rows before it, first tokens first; they are there already.
        starts: where the tokens of each of those rows begin in the request, and where those of the open
            row do, from which the request is computed.
        prompt_len: tokens that are prefilled, those of the chain included; after a preemption generated
            ones are among them.
        message: end of the first message among them, see `segments.first_message`.
        thresholds: the request's own.
        epoch: number of this admission; reports of an earlier one may still come.
    """

    request_id: str
    block_id: int
    slot: int
    chain: tuple[int, ...]
    starts: tuple[int, ...]
    prompt_len: int
    message: int
    thresholds: Thresholds
    epoch: int


@dataclass
class StepMessage(KVConnectorMetadata):
    """From the scheduler to every worker, before a step. Workers follow it in the order of the fields.

    Attributes:
        released: slots whose rows are gone: their pages are given back before anything else is done, and
            the same message may use the slots again.
        ended: requests that finished or were preempted. The slot of such a request's open row is in
            `released`, unless the row is kept as a closed one.
        back: those of them that did not finish: they were preempted, or more of their prompt has come.
        started: requests that start, or resume.
        closing: for each request of which this step's tokens complete segments, the slots of the closed
            rows that those become, in order. They follow the request's chain from then on.
        num_tokens: tokens of each scheduled request after the step.
        failed: scheduled requests that are too large for the whole pool. Their tokens of this step
            attend to each other alone, nothing of them is stored, no row is closed, and their blocks are
            reported as load errors, so that vLLM ends them.
    """

    released: list[int] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    back: set[str] = field(default_factory=set)
    started: list[Started] = field(default_factory=list)
    closing: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)


class PagesHeld(NamedTuple):
    """One request on one rank after a step.

    Attributes:
        num_pages: pages of its open row, over all layers and KV heads.
        growth: most pages that 1, 2, … more generated tokens can add to it; see `reference.report`.
        num_tokens: tokens of the request that its rows cover, closed ones included.
        epoch: the admission of the request that this is about.
        closed: pages of each row that the step closed, by its slot.
    """

    num_pages: int
    growth: tuple[int, ...]
    num_tokens: int
    epoch: int = 0
    closed: Mapping[int, int] = _NONE

    def fullest(self, other: "PagesHeld") -> "PagesHeld":
        """Two ranks in one: the fuller one decides."""
        return PagesHeld(
            max(self.num_pages, other.num_pages),
            tuple(map(max, self.growth, other.growth)),
            min(self.num_tokens, other.num_tokens),
            self.epoch,
            {
                slot: max(self.closed.get(slot, 0), other.closed.get(slot, 0))
                for slot in {**self.closed, **other.closed}
            },
        )


@dataclass
class ReportMessage(KVConnectorWorkerMetadata):
    """From a worker to the scheduler, after a step: the requests that ran in it."""

    reports: dict[str, PagesHeld]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "ReportMessage":
        """Join the reports of two ranks."""
        assert isinstance(other, ReportMessage), f"not a report of DiffKV: {other!r}"
        joined = {
            name: report.fullest(other.reports.get(name, report))
            for name, report in self.reports.items()
        }
        return ReportMessage({**other.reports, **joined})
