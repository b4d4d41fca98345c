"""Use of a cache, in numbers."""

from dataclasses import dataclass

__all__ = ["CacheUse"]


@dataclass(frozen=True)
class CacheUse:
    """Use of the pool by sequences, measured on it.

    Attributes:
        tokens: tokens of all sequences, padding not among them.
        high: tokens in the high tier, mean over layers and heads.
        low: likewise in the low tier.
        pages: held.
        num_bytes: pages, half-empty ones included, their ring entries, and the sequences' tables.
        bf16_bytes: bytes of the same tokens in bf16.
        nominal_bytes: bits of the codes of kept tokens alone.
    """

    tokens: int
    high: float
    low: float
    pages: int
    num_bytes: int
    bf16_bytes: int
    nominal_bytes: float

    @property
    def dropped(self) -> float:
        """Tokens that are gone, mean over layers and heads."""
        return max(0.0, self.tokens - self.high - self.low)

    @property
    def bytes_per_token(self) -> float:
        """All layers and heads."""
        return self.num_bytes / self.tokens

    @property
    def ratio_bf16(self) -> float:
        """Bytes of bf16 over those that are spent."""
        return self.bf16_bytes / self.num_bytes

    @property
    def nominal_ratio_bf16(self) -> float:
        """The same ratio by bits alone: never to be shown without `ratio_bf16`."""
        return self.bf16_bytes / self.nominal_bytes
