"""Where DiffKV keeps what it made once and will need again: compiled kernels, fetched models."""

import os
from pathlib import Path

__all__ = ["VARIABLE", "cache_folder"]

VARIABLE = "DIFFKV_CACHE_DIR"


def cache_folder() -> Path:
    """`$DIFFKV_CACHE_DIR`, else `$XDG_CACHE_HOME/diffkv`, else `~/.cache/diffkv`. It need not exist."""
    if own := os.environ.get(VARIABLE):
        return Path(own)
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "diffkv"
