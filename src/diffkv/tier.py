"""One tier of a page: how many tokens it holds, and where every byte of them is.

The only place that computes an offset in a page. Which tiers a page has, and how large it is, is in
`layout`. Bits and groups come from `quant`.
"""

from dataclasses import dataclass

from diffkv.quant import Format

__all__ = ["META_BYTES", "TierLayout", "align"]

META_BYTES = 4
"""Bytes of one (scale, zero) pair, both float16."""

SUM_BYTES = 4
POSITION_BYTES = 4

REGION_ALIGNMENT_BYTES = 16
"""Regions start where a 16-byte vector load may."""


def align(offset: int, alignment: int) -> int:
    """The first multiple of `alignment` from `offset` on."""
    return -(-offset // alignment) * alignment


def _tensor_bytes(bits: int, head_dim: int, element_bytes: int) -> int:
    """Bytes of one vector's codes; 16 bits store `element_bytes` an element (the model's dtype)."""
    return head_dim * element_bytes if bits == 16 else head_dim * bits // 8


def _meta_bytes(bits: int, groups: int) -> int:
    return 0 if bits == 16 else groups * META_BYTES


@dataclass(frozen=True)
class TierLayout:
    """Where the regions of one tier start inside a page. Offsets in bytes.

    A page of T = `tokens_per_page` tokens holds, in this order, each region aligned to 16 bytes
    except the last, which follows the one before it:

        k_codes    [T, k_code_bytes] uint8   (16 bits: the model's dtype)
        k_meta     [T, k_groups, 2] float16, (scale, zero); absent for 16 bits
        v_codes    [T, v_code_bytes] uint8
        v_meta     [T, v_groups, 2] float16
        sums       [T] float32, significance sums; absent if not tracked
        positions  [T] int32, index of the token in its request; absent if not tracked

    Sums and positions are there for whoever looks for a victim among the tier's tokens. Where no
    decision reads them, the tier is not *tracked*, and has neither.

    Codes of b < 8 bits are packed in planes: element j of a vector is in byte j % code_bytes, at bit
    (j // code_bytes) * b. So one shift and mask of a run of bytes gives a run of elements.
    """

    format: Format
    tracked: bool
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
    def place(
        cls, fmt: Format, head_dim: int, element_bytes: int, tracked: bool, tokens: int
    ) -> "TierLayout":
        """Place `tokens` tokens of a format, whatever page size that takes (`end`)."""
        k_code_bytes = _tensor_bytes(fmt.k_bits, head_dim, element_bytes)
        v_code_bytes = _tensor_bytes(fmt.v_bits, head_dim, element_bytes)
        token_bytes = (
            k_code_bytes,
            _meta_bytes(fmt.k_bits, fmt.k_groups),
            v_code_bytes,
            _meta_bytes(fmt.v_bits, fmt.v_groups),
            SUM_BYTES if tracked else 0,
        )
        starts = []
        offset = 0
        for region_bytes in token_bytes:
            offset = align(offset, REGION_ALIGNMENT_BYTES)
            starts.append(offset)
            offset += tokens * region_bytes
        k_codes, k_meta, v_codes, v_meta, sums = starts
        positions = offset
        end = positions + (tokens * POSITION_BYTES if tracked else 0)
        return cls(
            fmt,
            tracked,
            tokens,
            k_code_bytes,
            v_code_bytes,
            k_codes,
            k_meta,
            v_codes,
            v_meta,
            sums,
            positions,
            end,
        )

    @classmethod
    def fill(
        cls, fmt: Format, head_dim: int, element_bytes: int, tracked: bool, page_bytes: int
    ) -> "TierLayout | None":
        """Place as many tokens as fit a page; None if not even one does."""
        tokens = page_bytes // cls.place(fmt, head_dim, element_bytes, tracked, 1).token_bytes
        while tokens > 0:
            tier = cls.place(fmt, head_dim, element_bytes, tracked, tokens)
            if tier.end <= page_bytes:
                return tier
            tokens -= 1
        return None

    @property
    def vector_bytes(self) -> int:
        """Bytes of one token's key and value: codes, scales and zeros."""
        fmt = self.format
        return (
            self.k_code_bytes
            + self.v_code_bytes
            + _meta_bytes(fmt.k_bits, fmt.k_groups)
            + _meta_bytes(fmt.v_bits, fmt.v_groups)
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token without any padding."""
        return self.vector_bytes + (SUM_BYTES + POSITION_BYTES if self.tracked else 0)

    @property
    def regions(self) -> dict[str, tuple[int, int]]:
        """(offset, bytes) of each region, in page order; absent ones have 0 bytes."""
        fmt = self.format
        token_bytes = {
            "k_codes": self.k_code_bytes,
            "k_meta": _meta_bytes(fmt.k_bits, fmt.k_groups),
            "v_codes": self.v_code_bytes,
            "v_meta": _meta_bytes(fmt.v_bits, fmt.v_groups),
            "sums": SUM_BYTES if self.tracked else 0,
            "positions": POSITION_BYTES if self.tracked else 0,
        }
        return {
            name: (getattr(self, name), self.tokens_per_page * num_bytes)
            for name, num_bytes in token_bytes.items()
        }

    def unused_share(self, page_bytes: int) -> float:
        """Share of a full page that holds no token."""
        return 1 - self.tokens_per_page * self.token_bytes / page_bytes
