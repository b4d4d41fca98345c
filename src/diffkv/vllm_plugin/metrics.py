"""DiffKV's gauges in vLLM's log line and /metrics."""

from typing import Any

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

__all__ = ["GAUGES", "DiffKVPromMetrics", "DiffKVStats"]

PREFIX = "diffkv_"

GAUGES = {
    "pages_total": "Pages of the pool.",
    "pages_free": "Pages that no request holds.",
    "pages_held": "Pages that running requests hold.",
    "tokens_high": "Tokens of running requests kept in high precision, mean over heads.",
    "tokens_low": "Tokens of running requests kept in low precision, mean over heads.",
    "tokens_dropped": "Tokens of running requests that were dropped, mean over heads.",
    "bytes_per_token": "Bytes of the KV budget per token of running requests, all layers and heads.",
}

_EXTREMES = {"pages_free": min}
"""Ranks differ in what they hold: the fullest counts. All gauges but these take the maximum."""


class DiffKVStats(KVConnectorStats):
    """The pool at the end of a step."""

    def reset(self) -> None:
        """Forget."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Join another rank's or a later step's; gauges of the later step are the ones that count."""
        self.data = dict(other.data) or self.data
        return self

    def fullest(self, other: "DiffKVStats") -> "DiffKVStats":
        """Join another rank's of the same step."""
        joined = {
            name: _EXTREMES.get(name, max)(value, other.data.get(name, value))
            for name, value in self.data.items()
        }
        return DiffKVStats(joined)

    def reduce(self) -> dict[str, int | float]:
        """For the log line."""
        return {name: round(value, 2) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        """Whether there is anything to log."""
        return not self.data


def _unregister() -> None:
    """Forget the gauges of an earlier engine of this process, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)


class DiffKVPromMetrics(KVConnectorPromMetrics):
    """Prometheus gauges `diffkv_...`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _unregister()
        gauges = {
            name: self._gauge_cls(name=PREFIX + name, documentation=text, labelnames=labelnames)
            for name, text in GAUGES.items()
        }
        self._gauges = {
            engine: {name: gauge.labels(*values) for name, gauge in gauges.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Set the gauges."""
        for name, value in transfer_stats_data.items():
            self._gauges[engine_idx][name].set(value)
