"""Compile the C++ sources at first use, and keep the libraries in a cache directory.

A library is named by a hash of everything that went into it: sources, rendered header, flags,
compiler, OpenMP runtime and CPU. Processes may race: each writes a file of its own and renames it.
Headers that all libraries begin with are compiled once, too: half of the time went into parsing them.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from diffkv.cache_folder import cache_folder
from diffkv.quant import ConfigError

__all__ = ["FLAGS", "Settings", "load_library", "openmp_runtime", "settings"]

SOURCES = Path(__file__).parent / "csrc"

FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi",
    "-fno-math-errno", "-fno-trapping-math",
    # Codes must match the reference bit for bit; where a fused multiply-add pays, it is written out.
    "-ffp-contract=off",
)  # fmt: skip

PRELUDE = "prelude.h"
ERROR_LINES = 3
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Settings:
    """Choices of the environment.

    Attributes:
        compiler: command and leading arguments, `$CXX` or g++.
        cache_dir: folder of compiled libraries.
    """

    compiler: tuple[str, ...]
    cache_dir: Path


def settings() -> Settings:
    """Read the environment; the only place in the kernels that does. `$CXX` names the compiler."""
    compiler = tuple(shlex.split(os.environ.get("CXX", ""))) or ("g++",)
    return Settings(compiler, cache_folder())


def openmp_runtime() -> Path | None:
    """The OpenMP library that this process has loaded, torch's own, or None.

    Linking against that very file makes our threads torch's threads; a second runtime would have a
    second set of them.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.findall(r"(/\S.*/lib(?:gomp|iomp5)[-.][^/\n]*)$", maps, re.MULTILINE)
    return Path(found[0]) if found else None


def load_library(sources: tuple[str, ...], header: str = "") -> ctypes.CDLL:
    """Load the library of some sources, compiled if the cache does not have it.

    Args:
        sources: names in `csrc` of the translation units.
        header: text of `constants.h`, which the sources may include.

    Raises:
        ConfigError: no compiler, or it failed, or the cache directory cannot be written.
    """
    chosen = settings()
    runtime = openmp_runtime()
    key = _key(chosen.compiler, sources, header, runtime)
    path = chosen.cache_dir / f"{Path(sources[0]).stem}-{key}.so"
    if not _is_whole(path):
        _compile(chosen, sources, header, runtime, path)
    return ctypes.CDLL(str(path))


def _key(
    compiler: tuple[str, ...], sources: tuple[str, ...], header: str, runtime: Path | None
) -> str:
    digest = hashlib.sha256()
    texts = [
        path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")
    ]
    facts = (*FLAGS, *compiler, _version(compiler), _cpu(), str(runtime), *sources, header)
    for text in (*texts, *(fact.encode() for fact in facts)):
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()[:24]


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run((*compiler, "--version"), compiler).stdout.decode(errors="replace")


@functools.cache
def _cpu() -> str:
    """Model and instruction sets, for -march=native is only right on the machine it ran on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    facts = ("model name", "flags", "CPU implementer", "CPU part", "Features", "isa")
    return "\n".join(line for line in lines if line.startswith(facts))


def _run(command: tuple[str, ...], compiler: tuple[str, ...]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise ConfigError(
            f"the CPU kernels need a C++ compiler, and {shlex.join(compiler)} cannot be run "
            f"({error.strerror}): install g++ (Debian: apt-get install g++) or set CXX"
        ) from error


def _is_whole(path: Path) -> bool:
    """Whether a library is there as it was written: it ends in the digest of the rest."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-DIGEST_BYTES]).digest() == data[-DIGEST_BYTES:]


def _compile(
    chosen: Settings, sources: tuple[str, ...], header: str, runtime: Path | None, path: Path
) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        prelude = _prelude(chosen)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _build((*chosen.compiler, *prelude), sources, header, runtime, Path(folder))
            library = Path(folder, "library.so")
            data = library.read_bytes()
            library.write_bytes(data + hashlib.sha256(data).digest())
            os.replace(library, path)
    except OSError as error:
        raise ConfigError(
            f"cannot keep compiled kernels in {path.parent} ({error.strerror}): "
            f"set DIFFKV_CACHE_DIR to a directory that can be written"
        ) from error


def _prelude(chosen: Settings) -> tuple[str, ...]:
    """Flags by which a source begins with the compiled prelude, which is made now if it is not there."""
    source = SOURCES / PRELUDE
    if not source.exists():
        return ()
    made = chosen.cache_dir / f"prelude-{_key(chosen.compiler, (str(source),), '', None)}"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=chosen.cache_dir) as folder:
            # Next to what it was made of: a compiler that cannot take it reads that instead
            header = Path(folder, "made", PRELUDE)
            header.parent.mkdir()
            header.write_text(f'#include "{source}"\n')
            command = (*chosen.compiler, *FLAGS, "-x", "c++-header", str(header))
            _run((*command, "-o", f"{header}.gch"), chosen.compiler)
            with contextlib.suppress(OSError):  # another process was first
                header.parent.rename(made)
    return "-include", str(made / PRELUDE)


def _build(
    compiler: tuple[str, ...],
    sources: tuple[str, ...],
    header: str,
    runtime: Path | None,
    folder: Path,
) -> None:
    """Compile the sources side by side, and link them, to `library.so` in a folder."""
    (folder / "constants.h").write_text(header)
    objects = tuple(str(folder / Path(source).with_suffix(".o").name) for source in sources)
    include = (f"-I{SOURCES}", f"-I{folder}")
    commands = [
        (*compiler, *FLAGS, *include, "-c", str(SOURCES / source), "-o", out)
        for source, out in zip(sources, objects, strict=True)
    ]
    # stderr goes to files: a pipe that nobody reads could block the compiler
    logs = [folder / f"{number}.log" for number in range(len(commands))]
    running = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("wb") as stderr:
            running.append(subprocess.Popen(command, stdout=stderr, stderr=stderr))
    failed = [process.wait() != 0 for process in running]
    for command, log, has_failed in zip(commands, logs, failed, strict=True):
        if has_failed:
            raise _compile_error(command, log.read_text(errors="replace"))

    openmp = ("-fopenmp",) if runtime is None else (str(runtime),)
    command = (*compiler, "-shared", "-o", str(folder / "library.so"), *objects, *openmp)
    result = _run(command, compiler)
    if result.returncode:
        raise _compile_error(command, result.stderr.decode(errors="replace"))


def _compile_error(command: tuple[str, ...], log: str) -> ConfigError:
    lines = [line for line in log.splitlines() if "error" in line] or log.splitlines()
    return ConfigError(
        f"compiling the CPU kernels failed: {' | '.join(lines[:ERROR_LINES])}; "
        f"the command was {shlex.join(command)}"
    )
