"""Where every byte of a page is: the only place that computes a size, an offset or tokens per page.

A page is `page_bytes` bytes that hold tokens of one (request, layer, KV head, tier). Which tier follows
from the page table, so the same bytes serve either. Bits and groups come from `quant`.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffkv.quant import ConfigError, Format, LayerQuant, QuantConfig

__all__ = [
    "META_BYTES",
    "MIN_TOKENS_PER_PAGE",
    "CacheLayout",
    "LayerGroup",
    "PageLayout",
    "TierLayout",
    "tensor_bytes",
]

META_BYTES = 4
"""Bytes of one (scale, zero) pair, both float16."""

SUM_BYTES = 4
POSITION_BYTES = 4

SEGMENT_ALIGNMENT_BYTES = 16
"""Segments start where a 16-byte vector load may."""

PAGE_ALIGNMENT_BYTES = 32

MIN_TOKENS_PER_PAGE = 16
"""Fewest tokens a chosen page holds in any tier: one tile of a matrix product."""

HALF_EMPTY_CONTEXT = 1024
"""Tokens per head at which the choice of the page size weighs its half-empty pages."""

MAX_PAGE_BYTES = 1 << 20


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def tensor_bytes(bits: int, head_dim: int, element_bytes: int) -> int:
    """Bytes of one vector's codes; 16 bits store `element_bytes` an element (the model's dtype)."""
    return head_dim * element_bytes if bits == 16 else head_dim * bits // 8


def _meta_bytes(bits: int, groups: int) -> int:
    return 0 if bits == 16 else groups * META_BYTES


@dataclass(frozen=True)
class TierLayout:
    """Where the segments of one tier start inside a page. Offsets in bytes.

    A page of T = `tokens_per_page` tokens holds, in this order, each segment aligned to 16 bytes
    except the last, which follows the one before it:

        k_codes    [T, k_code_bytes] uint8   (16 bits: the model's dtype)
        k_meta     [T, k_groups, 2] float16, (scale, zero); absent for 16 bits
        v_codes    [T, v_code_bytes] uint8
        v_meta     [T, v_groups, 2] float16
        sums       [T] float32, significance sums
        positions  [T] int32, index of the token in its request

    Codes of b < 8 bits are packed in planes: element j of a vector is in byte j % code_bytes, at bit
    (j // code_bytes) * b. So one shift and mask of a run of bytes gives a run of elements.
    """

    format: Format
    tokens_per_page: int
    k_code_bytes: int
    v_code_bytes: int
    k_codes: int
    k_meta: int
    v_codes: int
    v_meta: int
    sums: int
    positions: int
    end: int

    @classmethod
    def place(cls, fmt: Format, head_dim: int, element_bytes: int, tokens: int) -> "TierLayout":
        """Place `tokens` tokens of a format, whatever page size that takes (`end`)."""
        k_code_bytes = tensor_bytes(fmt.k_bits, head_dim, element_bytes)
        v_code_bytes = tensor_bytes(fmt.v_bits, head_dim, element_bytes)
        token_bytes = (
            k_code_bytes,
            _meta_bytes(fmt.k_bits, fmt.k_groups),
            v_code_bytes,
            _meta_bytes(fmt.v_bits, fmt.v_groups),
            SUM_BYTES,
        )
        starts = []
        offset = 0
        for segment_bytes in token_bytes:
            offset = _align(offset, SEGMENT_ALIGNMENT_BYTES)
            starts.append(offset)
            offset += tokens * segment_bytes
        k_codes, k_meta, v_codes, v_meta, sums = starts
        positions = offset
        end = positions + tokens * POSITION_BYTES
        return cls(
            fmt, tokens, k_code_bytes, v_code_bytes,
            k_codes, k_meta, v_codes, v_meta, sums, positions, end,
        )  # fmt: skip

    @classmethod
    def fill(
        cls, fmt: Format, head_dim: int, element_bytes: int, page_bytes: int
    ) -> "TierLayout | None":
        """Place as many tokens as fit a page; None if not even one does."""
        tokens = page_bytes // cls.place(fmt, head_dim, element_bytes, 1).token_bytes
        while tokens > 0:
            tier = cls.place(fmt, head_dim, element_bytes, tokens)
            if tier.end <= page_bytes:
                return tier
            tokens -= 1
        return None

    @property
    def token_bytes(self) -> int:
        """Bytes of one token without any padding."""
        fmt = self.format
        return (
            self.k_code_bytes
            + self.v_code_bytes
            + _meta_bytes(fmt.k_bits, fmt.k_groups)
            + _meta_bytes(fmt.v_bits, fmt.v_groups)
            + SUM_BYTES
            + POSITION_BYTES
        )

    @property
    def segments(self) -> dict[str, tuple[int, int]]:
        """(offset, bytes) of each segment, in page order; absent ones have 0 bytes."""
        fmt = self.format
        token_bytes = {
            "k_codes": self.k_code_bytes,
            "k_meta": _meta_bytes(fmt.k_bits, fmt.k_groups),
            "v_codes": self.v_code_bytes,
            "v_meta": _meta_bytes(fmt.v_bits, fmt.v_groups),
            "sums": SUM_BYTES,
            "positions": POSITION_BYTES,
        }
        return {
            name: (getattr(self, name), self.tokens_per_page * num_bytes)
            for name, num_bytes in token_bytes.items()
        }

    def unused_share(self, page_bytes: int) -> float:
        """Share of a full page that holds no token."""
        return 1 - self.tokens_per_page * self.token_bytes / page_bytes


@dataclass(frozen=True)
class PageLayout:
    """A page of a quantisation configuration at one head_dim.

    Attributes:
        quant: the formats of the tiers.
        head_dim: elements of a key or value vector.
        element_bytes: bytes of an element of the model's dtype (16-bit formats store it): 2 or 4.
        page_bytes: bytes of a page.
        tiers: a TierLayout for each tier, high first.
    """

    quant: QuantConfig
    head_dim: int
    element_bytes: int
    page_bytes: int
    tiers: tuple[TierLayout, ...]

    @classmethod
    def derive(
        cls,
        quant: QuantConfig,
        head_dim: int,
        page_bytes: int | None = None,
        element_bytes: int = 2,
    ) -> "PageLayout":
        """Lay out a page, of the size that wastes least unless one is given.

        The waste that is weighed is the unused share of a full page, in the worse tier, plus what
        half-empty last pages cost a head of 1,024 tokens; no tier holds fewer than 16 tokens.

        Raises:
            ConfigError: head_dim or page_bytes that no page can have.
        """
        _check_head_dim(quant, head_dim)
        if page_bytes is None:
            page_bytes = _least_waste({quant: 1}, head_dim, element_bytes)
        if page_bytes % PAGE_ALIGNMENT_BYTES or not 0 < page_bytes <= MAX_PAGE_BYTES:
            raise ConfigError(
                f"page_bytes must be a multiple of {PAGE_ALIGNMENT_BYTES} up to {MAX_PAGE_BYTES}, "
                f"got {page_bytes}"
            )
        tiers = tuple(
            _fill_or_refuse(fmt, head_dim, element_bytes, page_bytes) for fmt in quant.tiers
        )
        if tiers[-1].token_bytes > tiers[0].token_bytes:
            # Demoting would cost memory, and no bound on the pages of a prompt would hold.
            raise ConfigError(
                f"a token of the low tier {quant.low} takes {tiers[-1].token_bytes} bytes at head_dim "
                f"{head_dim}, more than {tiers[0].token_bytes} of the high tier {quant.high}: "
                f"use fewer groups or bits in the low tier"
            )
        return cls(quant, head_dim, element_bytes, page_bytes, tiers)

    @property
    def high(self) -> TierLayout:
        """The high tier."""
        return self.tiers[0]

    @property
    def low(self) -> TierLayout | None:
        """The low tier, if the configuration has one."""
        return self.tiers[1] if len(self.tiers) > 1 else None

    def max_pages(self, num_tokens: int) -> int:
        """Most pages that one head of `num_tokens` kept tokens can hold, however they are tiered."""
        return self.max_new_pages(num_tokens)

    def max_new_pages(self, num_tokens: int) -> int:
        """Most pages that `num_tokens` more tokens can add to one head, whatever it holds already.

        Tokens fill two tiers at worst: all but one of them in the tier with the smaller page count,
        and one that opens a page of the other.
        """
        if num_tokens <= 0:
            return 0
        fewest = min(tier.tokens_per_page for tier in self.tiers)
        if len(self.tiers) == 1:
            return -(-num_tokens // fewest)
        return 1 if num_tokens == 1 else 1 + -(-(num_tokens - 1) // fewest)

    def page_token_bytes(self, tier: int) -> float:
        """Bytes per token of one KV head in full pages of a tier, padding included."""
        return self.page_bytes / self.tiers[tier].tokens_per_page


@dataclass(frozen=True)
class LayerGroup:
    """The layers of a model that share a configuration.

    Attributes:
        page: what is where in their pages.
        layers: of the model, ascending.
    """

    page: PageLayout
    layers: tuple[int, ...]


@dataclass(frozen=True)
class CacheLayout:
    """The pages of all layers of a model: of one size, so that any page serves any layer.

    Attributes:
        quant: the configuration of every layer.
        groups: layers by configuration.
    """

    quant: LayerQuant
    groups: tuple[LayerGroup, ...]

    @classmethod
    def derive(
        cls,
        quant: LayerQuant,
        num_layers: int,
        head_dim: int,
        page_bytes: int | None = None,
        element_bytes: int = 2,
    ) -> "CacheLayout":
        """Lay out the pages of every layer, of the size that wastes least unless one is given.

        The waste of a configuration is that of `PageLayout.derive`; those of several are weighed by
        their layers and the bytes of a token.

        Raises:
            ConfigError: layers that the model does not have, or what `PageLayout.derive` refuses.
        """
        layers = quant.groups(num_layers)
        for config in layers:
            _check_head_dim(config, head_dim)
        if page_bytes is None:
            counts = {config: len(members) for config, members in layers.items()}
            page_bytes = _least_waste(counts, head_dim, element_bytes)
        return cls(
            quant,
            tuple(
                LayerGroup(PageLayout.derive(config, head_dim, page_bytes, element_bytes), members)
                for config, members in layers.items()
            ),
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, of whatever layer."""
        return self.groups[0].page.page_bytes

    @property
    def head_dim(self) -> int:
        """Elements of a key or value vector."""
        return self.groups[0].page.head_dim

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return sum(len(group.layers) for group in self.groups)

    def max_pages(self, num_tokens: int) -> int:
        """Most pages that one head of every layer can hold, each with `num_tokens` kept tokens."""
        return sum(len(g.layers) * g.page.max_pages(num_tokens) for g in self.groups)

    def max_new_pages(self, num_tokens: int) -> int:
        """Most pages that `num_tokens` more tokens can add to one head of every layer together."""
        return sum(len(g.layers) * g.page.max_new_pages(num_tokens) for g in self.groups)

    def page_token_bytes(self, tier: int) -> float:
        """Bytes per token of one KV head of every layer, in full pages of a tier.

        Layers without a low tier count with their high one.
        """
        return self.page_bytes * sum(
            layers / placed.tokens_per_page for layers, placed in self._placed(tier)
        )

    def _placed(self, tier: int) -> list[tuple[int, TierLayout]]:
        """For each group, its number of layers and a tier of theirs; high where there is no low."""
        return [(len(g.layers), g.page.tiers[: tier + 1][-1]) for g in self.groups]

    def num_fitting(self, num_pages: int, tier: int) -> int:
        """Most tokens, all of a tier, that `num_pages` pages hold for one head of every layer."""
        placed = [(layers, t.tokens_per_page) for layers, t in self._placed(tier)]

        def needed(num_tokens: int) -> int:
            return sum(layers * -(-num_tokens // per_page) for layers, per_page in placed)

        most = num_pages * max(per_page for _, per_page in placed)
        return bisect_right(range(most + 1), num_pages, key=needed) - 1


def _check_head_dim(quant: QuantConfig, head_dim: int) -> None:
    if head_dim <= 0 or head_dim % 8:
        raise ConfigError(f"head_dim must be a positive multiple of 8, got {head_dim}")
    for fmt in quant.tiers:
        for name, groups in (("k", fmt.k_groups), ("v", fmt.v_groups)):
            if head_dim % groups:
                raise ConfigError(
                    f"{name}_groups of {fmt} must divide head_dim {head_dim}, got {groups}"
                )


def _fill_or_refuse(fmt: Format, head_dim: int, element_bytes: int, page_bytes: int) -> TierLayout:
    tier = TierLayout.fill(fmt, head_dim, element_bytes, page_bytes)
    if tier is None:
        one = TierLayout.place(fmt, head_dim, element_bytes, 1)
        raise ConfigError(
            f"no {fmt} token fits a page of {page_bytes} bytes at head_dim {head_dim}: "
            f"one token needs {one.end} bytes"
        )
    return tier


def _least_waste(layers: Mapping[QuantConfig, int], head_dim: int, element_bytes: int) -> int:
    """The page size with the least waste between 16 and 32 tokens of the largest format.

    `layers` says how many there are of each configuration.
    """

    def placed(quant: QuantConfig, tokens: int) -> Sequence[TierLayout]:
        return [TierLayout.place(fmt, head_dim, element_bytes, tokens) for fmt in quant.tiers]

    context_bytes = {
        quant: HALF_EMPTY_CONTEXT * min(tier.token_bytes for tier in placed(quant, 1))
        for quant in layers
    }
    all_bytes = sum(number * context_bytes[quant] for quant, number in layers.items())

    def waste(quant: QuantConfig, page_bytes: int) -> float:
        tiers = [_fill_or_refuse(fmt, head_dim, element_bytes, page_bytes) for fmt in quant.tiers]
        unused = max(tier.unused_share(page_bytes) for tier in tiers)
        return unused + len(tiers) * page_bytes / 2 / context_bytes[quant]

    def mean_waste(page_bytes: int) -> float:
        return sum(
            number * context_bytes[quant] / all_bytes * waste(quant, page_bytes)
            for quant, number in layers.items()
        )

    smallest = max(tier.end for quant in layers for tier in placed(quant, MIN_TOKENS_PER_PAGE))
    start = _align(smallest, PAGE_ALIGNMENT_BYTES)
    return min(range(start, 2 * start, PAGE_ALIGNMENT_BYTES), key=mean_waste)
