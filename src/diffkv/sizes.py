"""The one reader of sizes: bytes and numbers of tokens, as users write them.

A letter alone is read as vLLM reads it: `k m g t` are powers of 1000, `K M G T` powers of 1024. With B
behind it, a unit is a power of 1000 (`80GB`), with iB one of 1024 (`2GiB`), in letters of either size.
"""

import re

from diffkv.quant import ConfigError

__all__ = ["parse_bytes", "parse_tokens"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)
_LETTERS = "kmgt"

MOST_DIGITS = 100
"""More than sizes have, and fewer than Python can read."""


def parse_bytes(text: str) -> int:
    """Read `512MiB`, `80GB`, `1.5g`, `2G`, or a number of bytes.

    Raises:
        ConfigError: not of that form, or less than one byte; what the text must be.
    """
    num_bytes = _parse(text)
    if num_bytes is None or num_bytes < 1:
        raise ConfigError(
            f"must be bytes or a number with a unit, as in 512MiB, 80GB or 2G, got {text!r}"
        )
    return int(num_bytes)


def parse_tokens(text: str) -> int:
    """Read `32K` (32 * 1024), `32k` (32,000), or a number of tokens.

    Raises:
        ConfigError: not of that form, or no whole number of at least 1.
    """
    tokens = None if text.strip().lower().endswith("b") else _parse(text)
    if tokens is None:
        raise ConfigError(f"must be a number of tokens, as 32768 or 32K, got {text!r}")
    if tokens < 1 or tokens != int(tokens):
        raise ConfigError(f"must be a whole number of at least 1, got {text!r}")
    return int(tokens)


def _parse(text: str) -> float | None:
    """A number and its unit; None if it is of another form."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    number, letter, behind = match.groups()
    if len(number) > MOST_DIGITS:
        return None
    unit = 1
    if letter is not None:
        is_binary = behind.lower() == "ib" if behind else letter.isupper()
        unit = (1024 if is_binary else 1000) ** (_LETTERS.index(letter.lower()) + 1)
    return float(number) * unit if "." in number else int(number) * unit
