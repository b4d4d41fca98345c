"""Wheels that tests write, in place of those that a registry has."""

import base64
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

from diffkv.fetch import Package

__all__ = ["package_of", "write_wheel"]


def write_wheel(folder: Path, name: str, contents: Mapping[str, bytes]) -> Path:
    """Write release 1.0 of a package that needs another one, which there is not.

    Args:
        folder: where to.
        name: of the package.
        contents: its files, by their paths.
    """
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    files = {
        **contents,
        f"{module}/__init__.py": b"",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        "Requires-Dist: a-package-that-does-not-exist\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_digest(data)},{len(data)}\n" for path, data in files.items())
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return path


def package_of(name: str, wheel: Path) -> Package:
    """The package, as it is pinned."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Package(name, "1.0", digest, wheel.stat().st_size)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
