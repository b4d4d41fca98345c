"""Quantisation formats: the only place where bits and groups are data.

A format's text form (`k8v4`, `k4v2g2x4`), a configuration's (`k8v4-k4v2`) and that of configurations by
layer (`0-3:k8v8,4-:k8v4-k4v2`) are the keys used in the command line, file names, logs and engine
options. Byte sizes do not belong here: see `layout`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = [
    "BITS",
    "CUT_WIDTHS",
    "FLOAT16_MAX",
    "GROUPS",
    "MIN_SCALE",
    "OUTER",
    "ConfigError",
    "Format",
    "LayerQuant",
    "LayerSpan",
    "QuantConfig",
    "cut_of",
    "layers_text",
]

BITS = (16, 8, 4, 2, 1)
GROUPS = (1, 2, 4)

FLOAT16_MAX = 65504.0
"""Largest finite float16: scale and zero are stored in it, and values beyond it saturate."""

MIN_SCALE = 2.0**-24
"""Smallest float16 above 0, so that a constant vector has a scale to divide by, and a vector of small
elements one that fits them."""

_CUTS = {1: (0, 0, 9, 14, 17, 19, 21, 22, 23), 2: (0, 0, 1, 4, 6, 9, 11, 13, 14)}
"""64ths of a group's range that are cut off at each end, by bits and log2 of the group's elements.

What is beyond the ends is stored as the ends. Least squared error for normally distributed elements, of
which few are near the ends (docs/log.md); with more bits the best cut gains less than a tenth.
"""

CUT_WIDTHS = tuple(1 << power for power in range(len(_CUTS[1])))
"""Elements of groups with a cut of their own; between two the smaller counts, beyond all the last."""

OUTER = 11 / 64
"""Share of a range, at each end, called outer: a group with a quarter of its elements there is not cut.

Such a group has few values, as a vector with one outlier has after its rotation, and the ends are two
of them.
"""

_FORMAT = re.compile(r"k(?P<k>\d+)v(?P<v>\d+)(?:g(?P<gk>\d+)x(?P<gv>\d+))?")
_SPAN = re.compile(r"\s*(?P<first>\d{1,6})(?P<range>-(?P<last>\d{1,6})?)?\s*:(?P<quant>.*)")


class ConfigError(ValueError):
    """A user asked for something that cannot be done; the message says what would work."""


def cut_of(bits: int, width: int) -> float:
    """Share of a group's range that is cut off at each end; `width` elements a group."""
    if bits not in _CUTS:
        return 0.0
    return _CUTS[bits][min(width.bit_length(), len(CUT_WIDTHS)) - 1] / 64


def _choices(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, sorted(values)))


@dataclass(frozen=True)
class Format:
    """Bits and groups of one tier.

    Attributes:
        k_bits: bits of a key element; 16 stores the model's own dtype unchanged.
        v_bits: bits of a value element, likewise.
        k_groups: (scale, zero) pairs of a key vector; 1 where k_bits is 16.
        v_groups: (scale, zero) pairs of a value vector; 1 where v_bits is 16.
    """

    k_bits: int
    v_bits: int
    k_groups: int = 1
    v_groups: int = 1

    def __post_init__(self) -> None:
        """Refuse bits and groups that no kernel has."""
        for name, bits, groups in (
            ("k", self.k_bits, self.k_groups),
            ("v", self.v_bits, self.v_groups),
        ):
            if bits not in BITS:
                raise ConfigError(f"{name}_bits must be one of {_choices(BITS)}, got {bits}")
            if groups not in GROUPS:
                raise ConfigError(f"{name}_groups must be one of {_choices(GROUPS)}, got {groups}")
            if bits == 16 and groups != 1:
                raise ConfigError(
                    f"{name}_groups must be 1 where {name}_bits is 16 (nothing is scaled), got {groups}"
                )

    @classmethod
    def parse(cls, text: str) -> "Format":
        """Read `k8v4` or `k4v2g2x4` (groups of K x groups of V).

        Raises:
            ConfigError: not of that form, or bits or groups that do not exist.
        """
        match = _FORMAT.fullmatch(text.strip().lower())
        if match is None:
            raise ConfigError(
                f"unknown format {text!r}: write k<bits>v<bits>, for example k8v4, "
                f"or with groups k4v2g2x4; bits are {_choices(BITS)}, groups {_choices(GROUPS)}"
            )
        return cls(int(match["k"]), int(match["v"]), int(match["gk"] or 1), int(match["gv"] or 1))

    def __str__(self) -> str:
        """The text form, groups only where there are any."""
        grouped = self.k_groups > 1 or self.v_groups > 1
        return f"k{self.k_bits}v{self.v_bits}" + (
            f"g{self.k_groups}x{self.v_groups}" if grouped else ""
        )

    @property
    def nominal_bits(self) -> float:
        """Mean bits of an element, without any metadata."""
        return (self.k_bits + self.v_bits) / 2


@dataclass(frozen=True)
class QuantConfig:
    """The formats of a cache: the high tier, and the low tier if there is one."""

    high: Format
    low: Format | None = None

    def __post_init__(self) -> None:
        """Refuse a low tier that is not smaller than the high one."""
        if self.low is None:
            return
        if self.low == self.high:
            raise ConfigError(
                f"both tiers of {self.high}-{self.low} are the same: write one format, {self.high}"
            )
        if self.low.k_bits > self.high.k_bits or self.low.v_bits > self.high.v_bits:
            raise ConfigError(
                f"the low tier {self.low} has more bits than the high tier {self.high}: "
                f"write the higher format first, as in k8v4-k4v2"
            )

    @classmethod
    def parse(cls, text: str) -> "QuantConfig":
        """Read `k8v4-k4v2` (high-low) or `k8v4` (one tier).

        Raises:
            ConfigError: not of that form, or a pair of formats that makes no sense.
        """
        parts = text.split("-")
        if len(parts) > 2:
            raise ConfigError(
                f"{text!r} names {len(parts)} tiers: a configuration has one (k8v4) or two (k8v4-k4v2)"
            )
        return cls(*(Format.parse(part) for part in parts))

    def __str__(self) -> str:
        """The text form."""
        return str(self.high) if self.low is None else f"{self.high}-{self.low}"

    @property
    def tiers(self) -> tuple[Format, ...]:
        """The formats in tier order: high, then low if there is one."""
        return (self.high,) if self.low is None else (self.high, self.low)

    @property
    def has_low(self) -> bool:
        """Whether there is a low tier."""
        return self.low is not None


@dataclass(frozen=True)
class LayerSpan:
    """Neighbouring layers with the same configuration.

    Attributes:
        first: layer, from 0.
        last: layer, itself included; None: the model's last.
        quant: their configuration.
    """

    first: int
    last: int | None
    quant: QuantConfig

    @classmethod
    def parse(cls, text: str) -> "LayerSpan":
        """Read `0-3:k8v8`, `7:k8v8` (one layer) or `4-:k8v4-k4v2` (to the last layer).

        Raises:
            ConfigError: not of that form, or a configuration that makes no sense.
        """
        match = _SPAN.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"unknown layers {text!r}: write <first>-<last>:<formats>, for example "
                f"0-3:k8v8,4-:k8v4-k4v2; without <last> up to the model's last layer"
            )
        first = int(match["first"])
        last = int(match["last"]) if match["last"] else None if match["range"] else first
        if last is not None and last < first:
            raise ConfigError(f"layers {first}-{last} run backwards: write {last}-{first}")
        return cls(first, last, QuantConfig.parse(match["quant"]))

    @property
    def layers(self) -> str:
        """The layers' text form."""
        return _layers_text(self.first, self.last)

    def __str__(self) -> str:
        """The text form."""
        return f"{self.layers}:{self.quant}"


def _layers_text(first: int, last: int | None) -> str:
    return str(first) if first == last else f"{first}-{'' if last is None else last}"


def layers_text(layers: Sequence[int]) -> str:
    """The text form of some layers, ascending: `0-3,7`."""
    ends = [0, *(i for i in range(1, len(layers)) if layers[i] > layers[i - 1] + 1), len(layers)]
    return ",".join(_layers_text(layers[a], layers[b - 1]) for a, b in pairwise(ends))


def _name(layers: str) -> str:
    return f"layers {layers}" if "-" in layers else f"layer {layers}"


@dataclass(frozen=True)
class LayerQuant:
    """The configuration of every layer of a model.

    Attributes:
        spans: from layer 0 on, without gaps; neighbours differ. Only the last may be open.
    """

    spans: tuple[LayerSpan, ...]

    def __post_init__(self) -> None:
        """Refuse layers that no span names, or several.

        Raises:
            ConfigError: says which.
        """
        if self.spans[0].first:
            missing = _layers_text(0, self.spans[0].first - 1)
            raise ConfigError(f"no formats for {_name(missing)} in {self}: add {missing}:<formats>")
        for span, after in pairwise(self.spans):
            if span.last is None or span.last >= after.first:
                ends = [last for last in (span.last, after.last) if last is not None]
                twice = _layers_text(after.first, min(ends, default=None))
                raise ConfigError(
                    f"two formats for {_name(twice)} in {self}: name every layer once"
                )
            if span.last + 1 < after.first:
                missing = _layers_text(span.last + 1, after.first - 1)
                raise ConfigError(
                    f"no formats for {_name(missing)} in {self}: add {missing}:<formats>"
                )

    @classmethod
    def parse(cls, text: str) -> "LayerQuant":
        """Read `0-3:k8v8,4-:k8v4-k4v2` in any order, or one configuration for all layers.

        Raises:
            ConfigError: not of that form, or layers without formats, or with several.
        """
        if ":" not in text:
            return cls((LayerSpan(0, None, QuantConfig.parse(text)),))
        spans = sorted((LayerSpan.parse(part) for part in text.split(",")), key=lambda s: s.first)
        cls(tuple(spans))  # names what was written, before neighbours are joined
        joined = spans[:1]
        for span in spans[1:]:
            if span.quant == joined[-1].quant:
                joined[-1] = LayerSpan(joined[-1].first, span.last, span.quant)
            else:
                joined.append(span)
        return cls(tuple(joined))

    def __str__(self) -> str:
        """The text form; that of the configuration alone where all layers share it."""
        if len(self.spans) == 1 and (self.spans[0].first, self.spans[0].last) == (0, None):
            return str(self.spans[0].quant)
        return ",".join(map(str, self.spans))

    @property
    def num_layers(self) -> int | None:
        """Layers that are named; None if the last span is open."""
        last = self.spans[-1].last
        return None if last is None else last + 1

    @property
    def has_low(self) -> bool:
        """Whether any layer has a low tier."""
        return any(span.quant.has_low for span in self.spans)

    @property
    def all_have_low(self) -> bool:
        """Whether every layer has a low tier."""
        return all(span.quant.has_low for span in self.spans)

    @property
    def is_exact(self) -> bool:
        """Whether every layer stores the model's own numbers."""
        tiers = [tier for span in self.spans for tier in (span.quant.high, span.quant.low) if tier]
        return all((tier.k_bits, tier.v_bits) == (16, 16) for tier in tiers)

    def groups(self, num_layers: int) -> dict[QuantConfig, tuple[int, ...]]:
        """The layers of each configuration, in the order in which they first occur.

        Args:
            num_layers: of the model.

        Raises:
            ConfigError: the model has other layers than are named.
        """
        named, last = self.num_layers, num_layers - 1
        has = f"the model has {num_layers} layers, {_layers_text(0, last)}"
        for span in self.spans:
            if span.first > last or (span.last is not None and span.last > last):
                beyond = _layers_text(max(span.first, num_layers), span.last)
                raise ConfigError(f"{self} names {_name(beyond)}, but {has}")
        if named is not None and named < num_layers:
            missing = _layers_text(named, last)
            raise ConfigError(
                f"no formats for {_name(missing)} in {self}: {has}; add {missing}:<formats>"
            )
        groups: dict[QuantConfig, tuple[int, ...]] = {}
        for span in self.spans:
            end = num_layers if span.last is None else span.last + 1
            groups[span.quant] = groups.get(span.quant, ()) + tuple(range(span.first, end))
        return groups
