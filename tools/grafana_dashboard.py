"""Write docs/grafana/diffkv.json, a dashboard of DiffKV's metrics beside those of vLLM.

The panels are made from the metrics' own table, so that a new metric cannot be forgotten.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from diffkv.vllm_plugin.metrics import COUNTERS, GAUGES, HISTOGRAM, PREFIX

TARGET = Path(__file__).parents[1] / "docs" / "grafana" / "diffkv.json"
WIDTH, HEIGHT, COLUMNS = 12, 8, 2
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

PANELS = (
    ("Pages", ("pages_held", "pages_free", "pages_total"), "none"),
    ("Tokens by tier, mean over heads", ("tokens_high", "tokens_low", "tokens_dropped"), "none"),
    ("KV bytes per token", ("bytes_per_token",), "bytes"),
    ("Smaller than bf16 by", ("compression_ratio",), "none"),
)
"""Title, gauges, unit."""


def _target(expression: str, legend: str) -> dict[str, Any]:
    return {"datasource": DATASOURCE, "expr": expression, "legendFormat": legend}


def _panel(
    number: int, title: str, unit: str, targets: list[dict[str, Any]], text: str
) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "description": text,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "gridPos": {
            "x": number % COLUMNS * WIDTH,
            "y": number // COLUMNS * HEIGHT,
            "w": WIDTH,
            "h": HEIGHT,
        },
        "targets": targets,
    }


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    for title, names, unit in PANELS:
        targets = [_target(PREFIX + name, f"{name}, engine {{{{engine}}}}") for name in names]
        panels.append(_panel(len(panels), title, unit, targets, " ".join(GAUGES[n] for n in names)))
    for name, text in COUNTERS.items():
        # the client library appends _total to a counter's name
        target = _target(f"rate({PREFIX}{name}_total[1m])", f"{name}, engine {{{{engine}}}}")
        title = f"{name.replace('_', ' ').capitalize()} a second"
        panels.append(_panel(len(panels), title, "none", [target], text))
    quantiles = [
        _target(
            f"histogram_quantile({q}, sum by (le) (rate({PREFIX}{HISTOGRAM}_bucket[5m])))",
            f"p{q * 100:g}",
        )
        for q in (0.1, 0.5, 0.9)
    ]
    panels.append(
        _panel(len(panels), "Compression ratio of requests", "none", quantiles, "When they ended.")
    )
    stock = [
        _target("vllm:num_requests_running", "running"),
        _target("vllm:num_requests_waiting", "waiting"),
        _target("rate(vllm:num_preemptions_total[1m])", "preemptions a second"),
    ]
    panels.append(_panel(len(panels), "Requests", "none", stock, "vLLM's own."))
    return {
        "title": "DiffKV",
        "uid": "diffkv",
        "schemaVersion": 39,
        "tags": ["vllm", "diffkv"],
        "time": {"from": "now-30m", "to": "now"},
        "refresh": "10s",
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": panels,
    }


def main() -> None:
    """Write the file."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n")


if __name__ == "__main__":
    main()
