"""Every figure of /metrics is documented and on the dashboard."""

import json
import re
from pathlib import Path

import grafana_dashboard

from diffkv.vllm_plugin.metrics import COUNTERS, GAUGES, HISTOGRAM, PREFIX

ROOT = Path(__file__).parents[2]

NAMES = {PREFIX + name for name in GAUGES} | {f"{PREFIX}{name}_total" for name in COUNTERS}


def test_dashboard_is_up_to_date() -> None:
    written = json.loads(grafana_dashboard.TARGET.read_text(encoding="utf-8"))
    assert written == grafana_dashboard.dashboard(), "run python tools/grafana_dashboard.py"


def test_dashboard_shows_every_metric_and_no_other() -> None:
    shown = {
        name
        for panel in grafana_dashboard.dashboard()["panels"]
        for target in panel["targets"]
        for name in re.findall(rf"{PREFIX}\w+", target["expr"])
    }
    assert shown == NAMES | {f"{PREFIX}{HISTOGRAM}_bucket"}


def test_page_lists_every_metric() -> None:
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| .*$", page, re.M))
    rows = "\n".join(line for line in listed if f"`{PREFIX}" in line)
    assert set(re.findall(rf"`({PREFIX}\w+)`", rows)) == NAMES | {PREFIX + HISTOGRAM}
