"""Types of options that several commands have."""

from argparse import ArgumentTypeError
from collections.abc import Callable

__all__ = ["above_zero", "at_least", "positive", "size"]

SUFFIXES = {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
}


def at_least(least: int) -> Callable[[str], int]:
    """A whole number that is not below another one."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"must be a whole number, got {text}") from None
        if value < least:
            raise ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return parse


positive = at_least(1)


def size(text: str) -> int:
    """A whole number of at least 1, or a number above 0 and K, M, G, KiB, MiB or GiB."""
    for suffix, factor in SUFFIXES.items():
        if text.endswith(suffix):
            return int(above_zero(text.removesuffix(suffix)) * factor)
    return positive(text)


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a number, got {text}") from None
    if not value > 0:
        raise ArgumentTypeError(f"must be above 0, got {text}")
    return value
