"""Quantisation formats: the only place where bits and groups are data.

A format's text form (`k8v4`, `k4v2g2x4`) and a configuration's (`k8v4-k4v2`) are the keys used in the
command line, file names, logs and engine options. Byte sizes do not belong here: see `layout`.
"""

import re
from dataclasses import dataclass

__all__ = [
    "BITS",
    "CUT_WIDTHS",
    "DEFAULT_QUANT",
    "FLOAT16_MAX",
    "GROUPS",
    "MIN_SCALE",
    "OUTER",
    "STEPS",
    "STRETCHED_BITS",
    "ConfigError",
    "Format",
    "QuantConfig",
    "cut_of",
]

BITS = (16, 8, 4, 2, 1)
GROUPS = (1, 2, 4)

DEFAULT_QUANT = "k8v8-k4v2"
"""What engines, caches and commands take if they are told nothing else."""

FLOAT16_MAX = 65504.0
"""Largest finite float16: scale and zero are stored in it, and values beyond it saturate."""

MIN_SCALE = 2.0**-24
"""Smallest float16 above 0, so that a constant vector has a scale to divide by, and a vector of small
elements one that fits them."""

_CUTS = {1: (0, 0, 9, 14, 17, 19, 21, 22, 23), 2: (0, 0, 1, 4, 6, 9, 11, 13, 14)}
"""64ths of a group's range that are cut off at each end, by bits and log2 of the group's elements.

What is beyond the ends is stored as the ends. Least squared error for normally distributed elements, of
which few are near the ends (docs/decisions.md); with more bits the best cut gains less than a tenth.
"""

CUT_WIDTHS = tuple(1 << power for power in range(len(_CUTS[1])))
"""Elements of groups with a cut of their own; between two the smaller counts, beyond all the last."""

OUTER = 11 / 64
"""Share of a range, at each end, called outer: a group with a quarter of its elements there is not cut.

Such a group has few values, as a vector with one outlier has after its rotation, and the ends are two
of them.
"""

STRETCHED_BITS = 4
"""With so many bits or fewer, what is read back is as long as what was stored (docs/page-format.md)."""

STEPS = 1023
"""Parts of a group's range in which moments are counted: in integers, so that no order matters."""

_FORMAT = re.compile(r"k(?P<k>\d+)v(?P<v>\d+)(?:g(?P<gk>\d+)x(?P<gv>\d+))?")


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
        if ":" in text:
            raise ConfigError(
                f"formats by layer, as in {text!r}, are not supported: they gain nothing over one "
                f"configuration of the same bytes; name one for all layers, as in k8v4-k4v2"
            )
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

    @property
    def is_exact(self) -> bool:
        """Whether both tiers store the model's own numbers."""
        return all((tier.k_bits, tier.v_bits) == (16, 16) for tier in self.tiers)
