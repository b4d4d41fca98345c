"""Compile-time constants of kernels: `PageLayout` in the form that they are given it.

A constant that follows from others is computed here and not in a kernel.
"""

import functools
from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
import triton.language as tl

from diffkv.layout import PageLayout
from diffkv.quant import FLOAT16_MAX, cut_of
from diffkv.tier import META_BYTES, TierLayout

__all__ = [
    "DTYPES",
    "TILE_WARPS",
    "Side",
    "Table",
    "Tier",
    "cdiv",
    "chunk_shift",
    "is_roomy",
    "multiprocessors",
    "overlaps",
    "power_of_2",
    "tiers_of",
    "tile_vectors",
    "vector_side",
]

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

MIN_DOT = 16
"""Fewest rows and elements that a matrix product takes."""

MIN_COLUMNS = 8
"""Fewest columns."""

MIN_HEADS = MIN_COLUMNS // 2
"""Fewest query heads: of whole numbers, each is two columns."""

MIN_WHOLE = 32
"""Fewest elements that a product of whole numbers takes."""

TILE_CODE_BYTES = 8192
"""Packed bytes of K and V that one tile of attention converts, at most: more do not fit registers."""

TILE_VECTOR_BYTES = 16384
"""Bytes of a tile's keys as float16, at most, and of K and V of 16 bits."""

MAX_TILE_TOKENS = 64

MANTISSA = 10
"""Bits of a float16 number that its value is proportional to, below the normal ones."""

SUBNORMAL = 24
"""Bit 0 of such a number stands for one by so many powers of two."""

TILE_ELEMENTS = 512
"""Elements that one program quantises at a time: 16 for each thread of its `TILE_WARPS`."""

TILE_WARPS = 1


INTERPRETED_MULTIPROCESSORS = 2
"""Stands in for the number of multiprocessors where there is no GPU."""

ROOMY_BYTES = 220 << 10
"""Shared memory that takes 12 programs with two tiles each. Ada and SM120 have 100 KiB."""

OVERLAPPING = (9, 0)
"""Least compute capability of GPUs that begin a launch before the one ahead of it has ended."""


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up; Triton's own takes several times as long on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest one that is not below n, of 1 or more."""
    return 1 << (n - 1).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of a device's multiprocessors."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def is_roomy(device: torch.device) -> bool:
    """Whether a multiprocessor's shared memory takes two tiles of every program that it runs."""
    if device.type != "cuda":
        return False
    shared = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return int(shared) >= ROOMY_BYTES


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether launches on a device can overlap with the ones ahead of them."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OVERLAPPING


@triton.jit
def _jitted() -> None:
    pass


INTERPRETED = not isinstance(_jitted, triton.JITFunction)
"""Whether kernels run in Triton's interpreter, as they do where TRITON_INTERPRET=1."""


class _Constants:
    """Wraps every field as a kernel's constants are, so that what is computed from them is one, too.

    Every launch hashes its constants, so that is done once: field by field it takes longer than all the
    rest of a launch.
    """

    _values: tuple[Any, ...]
    _hash: int

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        values = tuple(getattr(self, name) for name in names)
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_hash", hash(values))
        if not INTERPRETED:
            for name, value in zip(names, values, strict=True):
                object.__setattr__(self, name, tl.constexpr(value))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is type(self) and other._values == self._values)


@dataclass(frozen=True, eq=False)
class Side(_Constants):
    """K or V of one tier. For kernels: outside of them, fields are no plain numbers.

    Attributes:
        bits: bits of an element.
        groups: (scale, zero) pairs of a vector; 1 where bits is 16, and then unused.
        head_dim: elements of a vector.
        codes: offset in a page, bytes.
        meta: likewise.
        code_bytes: bytes of a vector's codes.
        planes: elements that share a byte; 1 for 16 bits.
        width: elements of a plane.
        padded: width as a matrix product takes it.
        group_dim: elements of a group.
        split: groups of one plane where a plane has several, else 1.
        word: bytes that are transposed together where tokens are to be paired: 2 if a vector has enough.
        padded_words: words of a vector as a matrix product takes them.
        unit: what a code of 1 is in a product of keys, whose queries are as much larger as its plane
            stands lower than the topmost; 1 for 16 bits.
        places: by part of a value (its plane, and byte of a word), the bit of float16 where codes begin.
        units: likewise, what a code of 1 is in a product.
        boost: power of two that keeps probability times scale away from float16's subnormal range,
            and below its maximum whatever the scale is.
        cut: share of a group's range that is cut off at each end.
        whole: whether products of keys can take codes as whole numbers.
    """

    bits: int
    groups: int
    head_dim: int
    codes: int
    meta: int
    code_bytes: int
    planes: int
    width: int
    padded: int
    group_dim: int
    split: int
    word: int
    padded_words: int
    unit: float
    places: tuple[int, ...]
    units: tuple[float, ...]
    boost: float
    cut: float
    whole: bool


@dataclass(frozen=True, eq=False)
class Tier(_Constants):
    """One tier of a page. For kernels: outside of them, fields are no plain numbers.

    Attributes:
        k: keys.
        v: values.
        tokens: tokens of a page.
        reciprocal: 2 ** 32 / tokens, rounded up. A number of tokens below that, times it and over
            2 ** 32, is a number of pages.
        tracked: whether tokens have sums and positions.
        sums: offset of the significance sums in a page, bytes.
        positions: likewise.
        shift: a chunk of attention has 2 ** shift times fewer of its pages than of high ones.
    """

    k: Side
    v: Side
    tokens: int
    reciprocal: int
    tracked: bool
    sums: int
    positions: int
    shift: int


@dataclass(frozen=True, eq=False)
class Table(_Constants):
    """Sizes of page tables. For kernels: outside of them, fields are no plain numbers.

    Attributes:
        width: leaves that a row of the directory can name.
        entries: pages that a leaf names.
    """

    width: int
    entries: int


def _boost(bits: int) -> float:
    if bits == 16:
        return 1.0
    largest_scale = min(2 * FLOAT16_MAX / (2**bits - 1), FLOAT16_MAX)
    boost = 1.0
    while boost * 2 * largest_scale < FLOAT16_MAX:
        boost *= 2
    return boost


def _places(bits: int, planes: int, word: int) -> tuple[int, ...]:
    """See `Side`: where codes stand in a word, or 8 bits below, where that is no part of a mantissa."""
    standing = [byte * 8 + plane * bits for plane in range(planes) for byte in range(word)]
    return tuple(place if place + bits <= MANTISSA else place - 8 for place in standing)


def _side(bits: int, groups: int, head_dim: int, codes: int, meta: int, code_bytes: int) -> Side:
    planes = 1 if bits == 16 else 8 // bits
    width = head_dim // planes
    word = 2 if bits < 16 and width % 2 == 0 and width >= 2 * MIN_DOT else 1
    group_dim, padded = head_dim // groups, max(MIN_DOT, power_of_2(width))
    places = _places(bits, planes, word)
    return Side(
        bits, groups, head_dim, codes, meta, code_bytes, planes, width, padded,
        group_dim, max(1, groups // planes),
        word, max(MIN_DOT, power_of_2(width // word)),
        1.0 if bits == 16 else 2.0 ** (8 - bits - SUBNORMAL),
        places, tuple(1.0 if bits == 16 else 2.0 ** (place - SUBNORMAL) for place in places),
        _boost(bits), cut_of(bits, group_dim), bits < 16 and padded >= MIN_WHOLE,
    )  # fmt: skip


def vector_side(bits: int, groups: int, head_dim: int) -> Side:
    """Constants of vectors that are in no page."""
    return _side(bits, groups, head_dim, 0, 0, head_dim * bits // 8)


def chunk_shift(high_tokens: int, tokens: int) -> int:
    """How far a chunk's pages are shifted where a page has so many tokens, and a high one so many."""
    return max(0, (tokens // high_tokens).bit_length() - 1)


def _tier(tier: TierLayout, head_dim: int, high_tokens: int) -> Tier:
    fmt = tier.format
    return Tier(
        _side(fmt.k_bits, fmt.k_groups, head_dim, tier.k_codes, tier.k_meta, tier.k_code_bytes),
        _side(fmt.v_bits, fmt.v_groups, head_dim, tier.v_codes, tier.v_meta, tier.v_code_bytes),
        tier.tokens_per_page, cdiv(1 << 32, tier.tokens_per_page), tier.tracked, tier.sums,
        tier.positions, chunk_shift(high_tokens, tier.tokens_per_page),
    )  # fmt: skip


def tiers_of(layout: PageLayout) -> tuple[Tier, ...]:
    """Constants of a layout's tiers, high first."""
    assert META_BYTES == 4, "kernels read scale and zero as one 4-byte word"
    high_tokens = layout.high.tokens_per_page
    return tuple(_tier(tier, layout.head_dim, high_tokens) for tier in layout.tiers)


def tile_vectors(head_dim: int) -> int:
    """Vectors that one program quantises at a time."""
    return max(1, TILE_ELEMENTS // power_of_2(head_dim))


def tile_tokens(layout: PageLayout) -> int:
    """Tokens of a tile of attention; tiles know nothing of pages, so a page has any number of tokens."""
    formats = [tier.format for tier in layout.tiers]
    token_bytes = max(
        (tier.k_code_bytes if tier.format.k_bits < 16 else 0)
        + (tier.v_code_bytes if tier.format.v_bits < 16 else 0)
        for tier in layout.tiers
    )
    raw = [t.k_code_bytes + t.v_code_bytes for t in layout.tiers if t.format.v_bits == 16]
    vector_bytes = max([2 * power_of_2(layout.head_dim), *raw])
    tile = MAX_TILE_TOKENS
    while tile > MIN_DOT and (
        tile * token_bytes > TILE_CODE_BYTES or tile * vector_bytes > TILE_VECTOR_BYTES
    ):
        tile //= 2
    # Every group of values adds sums of a whole tile, and every plane a product of its own
    if any(fmt.v_groups > 2 or fmt.v_bits == 1 or fmt.k_bits == 1 for fmt in formats):
        tile = min(tile, MAX_TILE_TOKENS // 2)
    return tile
