"""Types and actions of options that several commands have."""

from argparse import (
    Action,
    ArgumentParser,
    ArgumentTypeError,
    BooleanOptionalAction,
    Namespace,
)
from collections.abc import Callable, Sequence
from typing import Any

from diffkv.quant import ConfigError
from diffkv.sizes import parse_bytes, parse_tokens

__all__ = [
    "Joined",
    "Listed",
    "Once",
    "Switch",
    "above_zero",
    "at_least",
    "flag_of",
    "num_bytes",
    "num_tokens",
    "positive",
]


def flag_of(name: str) -> str:
    """An option as it is typed, by its name in what was parsed."""
    return "--" + name.replace("_", "-")


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


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"must be a number, got {text}") from None
    if not value > 0:
        raise ArgumentTypeError(f"must be above 0, got {text}")
    return value


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
        raise ArgumentTypeError(str(error)) from None


class Once(Action):
    """Action of an option that takes one value: given twice with different ones, it is refused."""

    _read: Namespace | None = None

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Take the value.

        Raises:
            ConfigError: names the option and both values.
        """
        before = getattr(namespace, self.dest, None)
        self.take(namespace, values, f"{option_string} is given twice, with {before} and {values}")

    def take(self, namespace: Namespace, value: Any, conflict: str) -> None:
        """Set the value, unless this command line has set another one."""
        if self._read is namespace and getattr(namespace, self.dest) != value:
            raise ConfigError(f"{conflict}: keep one")
        self._read = namespace
        setattr(namespace, self.dest, value)


class Switch(BooleanOptionalAction, Once):
    """Action of an option that is turned on or, with `no-`, off: both together are refused."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Turn it on or off."""
        assert option_string is not None, "it is an option"
        conflict = f"{' and '.join(self.option_strings)} are both given"
        self.take(namespace, not option_string.startswith("--no-"), conflict)


class Listed(Action):
    """Action of an option that takes several values: given twice, it takes all of them."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Begin with the first occurrence, in place of the default; go on with the others."""
        before = getattr(namespace, self.dest)
        setattr(
            namespace, self.dest, values if before is self.default else self.both(before, values)
        )

    @staticmethod
    def both(before: Any, values: Any) -> Any:
        """The values of two occurrences."""
        assert isinstance(values, list), "for options with nargs"
        return [*before, *values]


class Joined(Listed):
    """Action of an option that takes names, separated by commas: given twice, it takes all of them."""

    @staticmethod
    def both(before: Any, values: Any) -> Any:
        """The names of two occurrences."""
        return f"{before},{values}"
