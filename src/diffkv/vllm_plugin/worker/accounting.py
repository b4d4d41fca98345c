"""A worker's figures: totals for a summary, gauges and counters for metrics."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffkv.shape import PoolShape
from diffkv.state import PoolState
from diffkv.vllm_plugin.metrics import COUNTERS
from diffkv.vllm_plugin.worker.snapshot import RunningRequest, Snapshot

__all__ = ["Accounts", "Totals"]


@dataclass
class Totals:
    """Sums over requests when they ended; token counts are means over heads.

    `nominal_bits` is the sum over kept tokens of their codes' bits an element, likewise a mean.
    """

    num_requests: int = 0
    num_tokens: int = 0
    high: float = 0.0
    low: float = 0.0
    nominal_bits: float = 0.0
    num_bytes: int = 0
    num_pages: int = 0
    pages_peak: int = 0
    running_peak: int = 0


class Accounts:
    """Counts what one worker's pool spends, from the snapshots of its steps.

    Args:
        shape: the pool's.
        state: the pool's, which is only read.
    """

    def __init__(self, shape: PoolShape, state: PoolState) -> None:
        self._shape = shape
        self._state = state
        self._totals = Totals()
        self._counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._ratios: list[float] = []
        self._snapshot: Snapshot | None = None
        # pages, high and low tokens of each row, as the snapshots so far have them, and of all rows
        self._held = np.zeros((shape.num_slots, 3), dtype=np.int64)
        self._kept = np.zeros(3, dtype=np.int64)

    @property
    def num_held(self) -> int:
        """Pages that requests hold."""
        head, tail = self._state.ring_ends.tolist()
        return self._state.num_pages - (tail - head)

    @contextmanager
    def managing(self) -> Iterator[None]:
        """Time spent inside counts as the manager's."""
        start = time.perf_counter()
        yield
        self._counters["manager_seconds"] += time.perf_counter() - start

    def step_began(self, num_running: int) -> None:
        """Note how many requests run."""
        self._totals.running_peak = max(self._totals.running_peak, num_running)

    def step_planned(self, num_compressed: int) -> None:
        """Count the prompts that are decided in a step."""
        self._counters["prompts_compressed"] += num_compressed

    def step_ended(self, snapshot: Snapshot) -> None:
        """Note the state of the pool; it holds most pages right after a step.

        Snapshots come in the order of their steps. What a request kept is known once all of those are
        there that it was in.
        """
        for request in snapshot.moment.ended:
            self._request_ended(request)
        self._note(snapshot.moment.message.released, 0)
        self._note(snapshot.slots, snapshot.numbers[1:, :3])
        before = 0 if self._snapshot is None else self._snapshot.demotions
        self._counters["demotions"] += snapshot.demotions - before
        held = self._state.num_pages - snapshot.num_free
        self._totals.pages_peak = max(self._totals.pages_peak, held)
        self._snapshot = snapshot

    def _note(self, slots: Sequence[int], held: np.ndarray | int) -> None:
        if slots:
            self._kept -= self._held[slots].sum(0)
            self._held[slots] = held
            self._kept += self._held[slots].sum(0)

    def _request_ended(self, request: RunningRequest) -> None:
        """Count what a request keeps, before it is released."""
        spent = self._add(self._totals, request)
        if spent:
            bf16 = self._shape.bf16_bytes_per_token * request.num_tokens
            self._ratios.append(bf16 / spent)

    def _add(self, totals: Totals, request: RunningRequest) -> int:
        """Add what a request keeps to some totals, and return its bytes: 0 if it has not run.

        Rows that it shares count as its own.
        """
        num_heads, rows = self._shape.num_heads, request.rows
        pages, high, low = self._held[rows].sum(0).tolist()
        if not pages:
            return 0
        totals.high += high / num_heads
        totals.low += low / num_heads
        for count, tier in zip((high, low), self._state.layout.tiers, strict=False):
            totals.nominal_bits += count * tier.format.nominal_bits / num_heads
        spent = self._shape.spent_bytes(pages, len(rows))
        totals.num_requests += 1
        totals.num_tokens += request.num_tokens
        totals.num_pages += pages
        totals.num_bytes += spent
        return spent

    def gauges(self) -> dict[str, float]:
        """The pool after the latest step that is known; token counts are means over heads."""
        num_heads = self._shape.num_heads
        high = low = per_token = 0.0
        held = num_tokens = 0
        if self._snapshot is not None:
            high, low = (n / num_heads for n in self._kept[1:].tolist())
            moment = self._snapshot.moment
            num_tokens = moment.num_tokens
            held = self._state.num_pages - self._snapshot.num_free
            if num_tokens:
                spent = self._shape.spent_bytes(held, moment.num_rows)
                per_token = spent / num_tokens
        return {
            "pages_total": self._state.num_pages,
            "pages_free": self._state.num_pages - held,
            "pages_held": held,
            "tokens_high": high,
            "tokens_low": low,
            "tokens_dropped": max(0.0, num_tokens - high - low),
            "bytes_per_token": per_token,
            "compression_ratio": self._shape.bf16_bytes_per_token / per_token if per_token else 0.0,
        }

    def take(self) -> tuple[dict[str, float], list[float]]:
        """Counters and compression ratios of ended requests since the last call."""
        taken = self._counters, self._ratios
        self._counters, self._ratios = dict.fromkeys(COUNTERS, 0), []
        return taken

    def summary(self, requests: list[RunningRequest]) -> dict[str, Any]:
        """Totals of all requests so far, running ones included, and the pool's shape."""
        totals = replace(self._totals)
        for request in requests:
            self._add(totals, request)
        return {
            "totals": dict(vars(totals)),
            "pool": {
                "quant": str(self._shape.layout.quant),
                "page_bytes": self._shape.layout.page_bytes,
                "num_pages": self._shape.num_pages,
                "pages_held": self.num_held,
                "num_slots": self._shape.num_slots,
                "table_bytes": self._shape.table_bytes,
                "bf16_bytes_per_token": self._shape.bf16_bytes_per_token,
            },
        }
