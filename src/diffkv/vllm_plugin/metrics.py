"""DiffKV's figures in vLLM's log line and /metrics, with the prefix `diffkv_`.

A worker sends what its pool holds after each step, by rank, and what it counted since the last one.
Joining two messages keeps the later figures of a rank and adds counts up.
"""

from typing import Any

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

__all__ = [
    "COUNTERS",
    "GAUGES",
    "HISTOGRAM",
    "PREFIX",
    "DiffKVPromMetrics",
    "DiffKVStats",
    "join_ranks",
]

PREFIX = "diffkv_"

GAUGES = {
    "pages_total": "Pages of the pool, all ranks.",
    "pages_free": "Pages that hold nothing, all ranks.",
    "pages_held": "Pages of running requests and of rows kept for later ones, all ranks.",
    "tokens_high": "Tokens in these pages kept in high precision, mean over heads.",
    "tokens_low": "Tokens in these pages kept in low precision, mean over heads.",
    "tokens_dropped": "Tokens of the same rows that were dropped, mean over heads.",
    "bytes_per_token": "Bytes of the KV budget per token of these rows, all layers, heads and "
    "ranks; pages, half-empty ones included, and tables. A shared row counts once.",
    "compression_ratio": "Bytes of the same tokens in bf16 over those bytes.",
}

_SUMMED = ("pages_total", "pages_free", "pages_held", "bytes_per_token")
"""Ranks hold different heads, so these add up; means over heads are averaged."""

COUNTERS = {
    "demotions": "Tokens requantised from high to low precision while generating, over all heads.",
    "prompts_compressed": "Prompts whose tokens were sorted into tiers.",
    "manager_seconds": "Time spent planning, releasing and reporting pages, first rank.",
}

_BY_RANK = ("demotions",)
"""Counts of a rank's own heads; the others are counted by the first rank, for all."""

HISTOGRAM = "request_compression_ratio"
_RATIO_BUCKETS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 8.0, 12.0)


def join_ranks(ranks: dict[str, dict[str, float]]) -> dict[str, float]:
    """One set of gauges for an engine."""
    joined = {}
    for name in GAUGES:
        values = [gauges[name] for gauges in ranks.values()]
        joined[name] = sum(values) if name in _SUMMED else sum(values) / len(values)
    return joined


class DiffKVStats(KVConnectorStats):
    """Gauges by rank, counts, and ratios of ended requests."""

    @classmethod
    def of_rank(
        cls, rank: int, gauges: dict[str, float], counters: dict[str, float], ratios: list[float]
    ) -> "DiffKVStats":
        """A worker's figures after a step."""
        if rank:
            counters, ratios = {name: counters[name] for name in _BY_RANK}, []
        return cls({"ranks": {str(rank): gauges}, "counters": counters, "ratios": ratios})

    def reset(self) -> None:
        """Forget."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Join another rank's, or a later step's."""
        if not self.data or not other.data:
            self.data = self.data or other.data
            return self
        counters = dict(self.data["counters"])
        for name, count in other.data["counters"].items():
            counters[name] = counters.get(name, 0) + count
        self.data = {
            "ranks": {**self.data["ranks"], **other.data["ranks"]},
            "counters": counters,
            "ratios": [*self.data["ratios"], *other.data["ratios"]],
        }
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log line."""
        figures = {**join_ranks(self.data["ranks"]), **self.data["counters"]}
        return {PREFIX + name: round(value, 3) for name, value in figures.items()}

    def is_empty(self) -> bool:
        """Whether there is anything to log."""
        return not self.data


def _unregister() -> None:
    """Forget the metrics of an earlier engine of this process, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)


class DiffKVPromMetrics(KVConnectorPromMetrics):
    """Prometheus gauges, counters and a histogram."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _unregister()
        # of several API servers each sets a gauge, and the latest is right
        gauges = {"labelnames": labelnames, "multiprocess_mode": "mostrecent"}
        metrics = {
            name: self._gauge_cls(PREFIX + name, text, **gauges) for name, text in GAUGES.items()
        }
        for name, text in COUNTERS.items():
            metrics[name] = self._counter_cls(PREFIX + name, text, labelnames=labelnames)
        metrics[HISTOGRAM] = self._histogram_cls(
            name=PREFIX + HISTOGRAM,
            documentation="Bytes in bf16 over bytes spent, of each request when it ended.",
            buckets=_RATIO_BUCKETS,
            labelnames=labelnames,
        )
        self._metrics = {
            engine: {name: metric.labels(*values) for name, metric in metrics.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Set gauges, add counts."""
        metrics = self._metrics[engine_idx]
        for name, value in join_ranks(transfer_stats_data["ranks"]).items():
            metrics[name].set(value)
        for name, count in transfer_stats_data["counters"].items():
            metrics[name].inc(count)
        for ratio in transfer_stats_data["ratios"]:
            metrics[HISTOGRAM].observe(ratio)
