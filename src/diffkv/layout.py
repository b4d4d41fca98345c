"""The pages of a configuration: their size, the tiers that they may serve, and how many are needed.

A page is `page_bytes` bytes that hold tokens of one (request, layer, KV head, tier). Which tier follows
from the page table, so the same bytes serve either. Bits and groups come from `quant`; where the bytes
of a tier's tokens are is in `tier`.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffkv.quant import ConfigError, Format, LayerQuant, QuantConfig
from diffkv.tier import TierLayout, align

__all__ = ["MIN_TOKENS_PER_PAGE", "CacheLayout", "LayerGroup", "PageLayout"]

PAGE_ALIGNMENT_BYTES = 32

MIN_TOKENS_PER_PAGE = 16
"""Fewest tokens a chosen page holds in any tier: one tile of a matrix product."""

HALF_EMPTY_CONTEXT = 1024
"""Tokens per head at which the choice of the page size weighs its half-empty pages."""

MAX_PAGE_BYTES = 1 << 20


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
            page_bytes = _least_waste({quant: 1}, head_dim, element_bytes, drops)
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
        drops: bool = False,
    ) -> "CacheLayout":
        """Lay out the pages of every layer, of the size that wastes least unless one is given.

        `drops` is that of `PageLayout.derive`, as is the waste of a configuration; those of several are
        weighed by their layers and the bytes of a token.

        Raises:
            ConfigError: layers that the model does not have, or what `PageLayout.derive` refuses.
        """
        layers = quant.groups(num_layers)
        for config in layers:
            _check_head_dim(config, head_dim)
        if page_bytes is None:
            counts = {config: len(members) for config, members in layers.items()}
            page_bytes = _least_waste(counts, head_dim, element_bytes, drops)
        return cls(
            quant,
            tuple(
                LayerGroup(
                    PageLayout.derive(config, head_dim, page_bytes, element_bytes, drops), members
                )
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
    def drops(self) -> bool:
        """Whether generated tokens may push others out."""
        return self.groups[0].page.drops

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


def _least_waste(
    layers: Mapping[QuantConfig, int], head_dim: int, element_bytes: int, drops: bool
) -> int:
    """The page size with the least waste between 16 and 32 tokens of the largest format.

    `layers` says how many there are of each configuration.
    """

    def placed(quant: QuantConfig, tokens: int) -> Sequence[TierLayout]:
        return [
            TierLayout.place(fmt, head_dim, element_bytes, tracked, tokens)
            for fmt, tracked in _tracked(quant, drops)
        ]

    context_bytes = {
        quant: HALF_EMPTY_CONTEXT * min(tier.token_bytes for tier in placed(quant, 1))
        for quant in layers
    }
    all_bytes = sum(number * context_bytes[quant] for quant, number in layers.items())

    def waste(quant: QuantConfig, page_bytes: int) -> float:
        tiers = [
            _fill_or_refuse(fmt, head_dim, element_bytes, tracked, page_bytes)
            for fmt, tracked in _tracked(quant, drops)
        ]
        unused = max(tier.unused_share(page_bytes) for tier in tiers)
        return unused + len(tiers) * page_bytes / 2 / context_bytes[quant]

    def mean_waste(page_bytes: int) -> float:
        return sum(
            number * context_bytes[quant] / all_bytes * waste(quant, page_bytes)
            for quant, number in layers.items()
        )

    smallest = max(tier.end for quant in layers for tier in placed(quant, MIN_TOKENS_PER_PAGE))
    start = align(smallest, PAGE_ALIGNMENT_BYTES)
    return min(range(start, 2 * start, PAGE_ALIGNMENT_BYTES), key=mean_waste)
