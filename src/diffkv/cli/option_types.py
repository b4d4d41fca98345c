"""Types and actions of options that several commands share: sizes, and lists that lose nothing."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from diffkv.quant import ConfigError
from diffkv.sizes import parse_bytes, parse_tokens

__all__ = ["Joined", "Listed", "num_bytes", "num_tokens"]


def num_bytes(text: str) -> int:
    """An option in bytes, see `diffkv.sizes`."""
    return _read(parse_bytes, text)


def num_tokens(text: str) -> int:
    """An option in tokens, likewise."""
    return _read(parse_tokens, text)


def _read(parse: Callable[[str], int], text: str) -> int:
    try:
        return parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Listed(argparse.Action):
    """Of an option that takes several values: one given twice takes all of them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Begin with the first occurrence, in place of the default; go on with the others."""
        assert isinstance(values, list), "for options with nargs"
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


class Joined(argparse.Action):
    """Of an option that takes names, separated by commas: one given twice takes all of them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """As `Listed`."""
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else f"{before},{values}")
