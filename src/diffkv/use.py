"""What a cache holds, in numbers: the same for every engine."""

from dataclasses import dataclass, fields

__all__ = ["CacheUse"]


@dataclass(frozen=True)
class CacheUse:
    """What some sequences hold, measured on the pool; uses of several add up.

    Attributes:
        tokens: tokens of all sequences, padding not among them.
        high: tokens in the high tier, mean over layers and heads.
        low: likewise in the low tier.
        pages: held.
        num_bytes: pages, half-empty ones included, their ring entries, and the sequences' tables.
        bf16_bytes: bytes of the same tokens in bf16.
        nominal_bytes: bytes of the codes of kept tokens alone.
    """

    tokens: int = 0
    high: float = 0.0
    low: float = 0.0
    pages: int = 0
    num_bytes: int = 0
    bf16_bytes: int = 0
    nominal_bytes: float = 0.0

    def __add__(self, other: "CacheUse") -> "CacheUse":
        return CacheUse(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: "CacheUse") -> "CacheUse":
        return CacheUse(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def dropped(self) -> float:
        """Tokens that are gone, mean over layers and heads."""
        return max(0.0, self.tokens - self.high - self.low)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a token in all layers and heads."""
        return self.num_bytes / self.tokens

    @property
    def ratio_bf16(self) -> float:
        """How many times fewer bytes than bf16."""
        return self.bf16_bytes / self.num_bytes

    @property
    def nominal_ratio_bf16(self) -> float:
        """The same by the bits of codes alone: without metadata, part-full pages and tables."""
        return self.bf16_bytes / self.nominal_bytes

    def per_token(self) -> dict[str, float]:
        """Bytes, ratios and shares of tokens, as rows of results name them."""
        return {
            "bytes_per_token": self.bytes_per_token,
            "ratio_bf16": self.ratio_bf16,
            "nominal_ratio_bf16": self.nominal_ratio_bf16,
            "high": min(1.0, self.high / self.tokens),
            "low": min(1.0, self.low / self.tokens),
            "dropped": self.dropped / self.tokens,
        }
