"""The messages between scheduler and workers: everything that crosses from one process to the other.

Down, before a step: which requests ended and which start. Up, after it: the pages that each request
holds. Figures for /metrics go up beside these, see `metrics.DiffKVStats`.
"""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from diffkv.policy import Thresholds

__all__ = ["MAX_IN_FLIGHT", "PagesHeld", "ReportMessage", "Started", "StepMessage"]

MAX_IN_FLIGHT = 4
"""Generated tokens that a report may be behind: with asynchronous scheduling it lags by two steps, and
a worker that does not wait for its device adds one."""


@dataclass(frozen=True)
class Started:
    """A request that the scheduler admits, or resumes after a preemption.

    Attributes:
        request_id: vLLM's name of it.
        block_id: the block that is the request's identity in block tables.
        prompt_len: tokens that are prefilled; after a preemption generated ones are among them.
        thresholds: the request's own.
        epoch: number of this admission; reports of an earlier one may still come.
        max_pages: most pages that the prompt may take on a rank; None: as many as it needs.
    """

    request_id: str
    block_id: int
    prompt_len: int
    thresholds: Thresholds
    epoch: int
    max_pages: int | None = None


@dataclass
class StepMessage(KVConnectorMetadata):
    """From the scheduler to every worker, before a step.

    Attributes:
        ended: requests that finished or were preempted.
        started: requests that start, or resume.
        num_tokens: tokens of each scheduled request after the step.
    """

    ended: set[str] = field(default_factory=set)
    started: list[Started] = field(default_factory=list)
    num_tokens: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PagesHeld:
    """One request on one rank after a step.

    Attributes:
        num_pages: pages it holds, over all layers and KV heads.
        growth: most pages that 1, 2, … more tokens can add; see `pool.page_growth`.
        num_tokens: tokens of the request that the pages cover.
        given_up: whether it was a prompt that exceeded its limit, so that its pages are not kept.
        epoch: the admission of the request that this is about.
    """

    num_pages: int
    growth: tuple[int, ...]
    num_tokens: int
    given_up: bool = False
    epoch: int = 0

    def fullest(self, other: "PagesHeld") -> "PagesHeld":
        """Two ranks in one: the fuller one decides."""
        return PagesHeld(
            max(self.num_pages, other.num_pages),
            tuple(map(max, self.growth, other.growth)),
            min(self.num_tokens, other.num_tokens),
            self.given_up or other.given_up,
            self.epoch,
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
