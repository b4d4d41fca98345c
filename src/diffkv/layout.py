"""The pages of a configuration: their size, the tiers that they may serve, and how many are needed.

A page is `page_bytes` bytes that hold tokens of one (request, layer, KV head, tier). Which tier follows
from the page table, so the same bytes serve either. Bits and groups come from `quant`; where the bytes
of a tier's tokens are is in `tier`.
"""

from dataclasses import dataclass
from functools import cached_property

from diffkv.quant import ConfigError, Format, QuantConfig
from diffkv.tier import TierLayout, align

__all__ = ["MIN_TOKENS_PER_PAGE", "PageLayout", "bf16_bytes_per_token"]

PAGE_ALIGNMENT_BYTES = 32

MIN_TOKENS_PER_PAGE = 16
"""Fewest tokens a chosen page holds in any tier: one tile of a matrix product."""

HALF_EMPTY_CONTEXT = 1024
"""Tokens per head at which the choice of the page size weighs its half-empty pages."""

MAX_PAGE_BYTES = 1 << 20

BF16_BYTES = 2

EXACT = QuantConfig.parse("k16v16")
"""The formats of prompt tokens that wait for the rest of their segment."""


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
        drops: bool = False,
    ) -> "PageLayout":
        """Lay out a page, of the size that wastes least unless one is given.

        With `drops`, generated tokens may push others out (alpha_low above 0), so that every tier has
        victims and is tracked. Without, a victim is only ever demoted: a low tier has none, and
        neither has a tier that is alone.

        The waste that is weighed is the unused share of a full page, in the worse tier, plus what
        half-empty last pages cost a head of 1,024 tokens; no tier holds fewer than 16 tokens.

        Raises:
            ConfigError: head_dim or page_bytes that no page can have.
        """
        _check_head_dim(quant, head_dim)
        if page_bytes is None:
            page_bytes = _least_waste(quant, head_dim, element_bytes, drops)
        if page_bytes % PAGE_ALIGNMENT_BYTES or not 0 < page_bytes <= MAX_PAGE_BYTES:
            raise ConfigError(
                f"page_bytes must be a multiple of {PAGE_ALIGNMENT_BYTES} up to {MAX_PAGE_BYTES}, "
                f"got {page_bytes}"
            )
        tiers = tuple(
            _fill_or_refuse(fmt, head_dim, element_bytes, tracked, page_bytes)
            for fmt, tracked in _tracked(quant, drops)
        )
        if tiers[-1].vector_bytes > tiers[0].vector_bytes:
            # Demoting would cost memory, and no bound on the pages of a prompt would hold.
            raise ConfigError(
                f"a token of the low tier {quant.low} takes {tiers[-1].vector_bytes} bytes at head_dim "
                f"{head_dim}, more than {tiers[0].vector_bytes} of the high tier {quant.high}: "
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

    @property
    def centred(self) -> bool:
        """Whether keys are stored as differences from their row's centre: wherever they are rounded."""
        return all(tier.format.k_bits < 16 for tier in self.tiers)

    def exact(self) -> "PageLayout":
        """The same pages filled with tokens as the model made them, of one tier."""
        return PageLayout.derive(EXACT, self.head_dim, self.page_bytes, self.element_bytes)

    @property
    def drops(self) -> bool:
        """Whether generated tokens may push others out."""
        return self.tiers[-1].tracked

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
        fewest = self._fewest_tokens
        if len(self.tiers) == 1:
            return -(-num_tokens // fewest)
        return 1 if num_tokens == 1 else 1 + -(-(num_tokens - 1) // fewest)

    @cached_property
    def _fewest_tokens(self) -> int:
        """Of a page of either tier."""
        return min(tier.tokens_per_page for tier in self.tiers)

    def page_token_bytes(self, tier: int) -> float:
        """Bytes per token of one KV head in full pages of a tier, padding included."""
        return self.page_bytes / self.tiers[tier].tokens_per_page


def bf16_bytes_per_token(num_heads: int, head_dim: int) -> int:
    """Bytes of a token's keys and values in bf16: what compression is measured against.

    Args:
        num_heads: KV heads, of all layers that count.
        head_dim: elements of a key or value vector.
    """
    return num_heads * 2 * head_dim * BF16_BYTES


def _check_head_dim(quant: QuantConfig, head_dim: int) -> None:
    if head_dim <= 0 or head_dim % 8:
        raise ConfigError(f"head_dim must be a positive multiple of 8, got {head_dim}")
    for fmt in quant.tiers:
        for name, groups in (("k", fmt.k_groups), ("v", fmt.v_groups)):
            if head_dim % groups:
                raise ConfigError(
                    f"{name}_groups of {fmt} must divide head_dim {head_dim}, got {groups}"
                )


def _tracked(quant: QuantConfig, drops: bool) -> tuple[tuple[Format, bool], ...]:
    """The formats of a configuration, each with whether its tier is tracked."""
    return tuple(
        (fmt, drops or (number == 0 and quant.has_low)) for number, fmt in enumerate(quant.tiers)
    )


def _fill_or_refuse(
    fmt: Format, head_dim: int, element_bytes: int, tracked: bool, page_bytes: int
) -> TierLayout:
    tier = TierLayout.fill(fmt, head_dim, element_bytes, tracked, page_bytes)
    if tier is None:
        one = TierLayout.place(fmt, head_dim, element_bytes, tracked, 1)
        raise ConfigError(
            f"no {fmt} token fits a page of {page_bytes} bytes at head_dim {head_dim}: "
            f"one token needs {one.end} bytes"
        )
    return tier


def _least_waste(quant: QuantConfig, head_dim: int, element_bytes: int, drops: bool) -> int:
    """The page size with the least waste between 16 and 32 tokens of the largest format."""
    formats = _tracked(quant, drops)

    def placed(tokens: int) -> list[TierLayout]:
        return [
            TierLayout.place(fmt, head_dim, element_bytes, tracked, tokens)
            for fmt, tracked in formats
        ]

    context_bytes = HALF_EMPTY_CONTEXT * min(tier.token_bytes for tier in placed(1))

    def waste(page_bytes: int) -> float:
        tiers = [
            _fill_or_refuse(fmt, head_dim, element_bytes, tracked, page_bytes)
            for fmt, tracked in formats
        ]
        unused = max(tier.unused_share(page_bytes) for tier in tiers)
        return unused + len(tiers) * page_bytes / 2 / context_bytes

    exact = TierLayout.place(EXACT.high, head_dim, element_bytes, False, 1)
    smallest = max(exact.end, *(tier.end for tier in placed(MIN_TOKENS_PER_PAGE)))
    start = align(smallest, PAGE_ALIGNMENT_BYTES)
    return min(range(start, 2 * start, PAGE_ALIGNMENT_BYTES), key=waste)
