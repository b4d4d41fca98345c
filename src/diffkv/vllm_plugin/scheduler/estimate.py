"""The expected size of tokens once their tiers are known, learned from those before them.

Learned are shares: the pages that the tokens of a row took, of the most that so many can take. By them
requests are admitted. What is stored is paid for by itself, whatever was expected.
"""

import math
from collections import OrderedDict, deque

from diffkv.policy import Thresholds
from diffkv.shape import HIGH_SHARE, PoolShape

__all__ = ["RowSizes"]

SEEN = 32
"""Rows of a kind that are remembered. If the next one is like them, the chance that it is larger than
all of them is 1 in 33, before the margin."""

FEWEST_SEEN = 8
"""Rows of a kind before their sizes are believed."""

MARGIN = 1.1
"""Times the largest share that is remembered."""

MOST_KINDS = 512
"""Kinds that are remembered; thresholds are the clients' choice, so they could grow without end."""

Kind = tuple[Thresholds, int]


class RowSizes:
    """Expects of a row the largest share among the latest of its kind, and a margin.

    Rows of one kind have the same thresholds, and lengths of as many bits: the window, half-empty pages
    and alpha / N weigh less in longer ones.

    Args:
        shape: the pool's.
        worst: whether to expect the most that tokens can take, always.
    """

    def __init__(self, shape: PoolShape, worst: bool) -> None:
        self._shape = shape
        self._worst = worst
        self._seen: OrderedDict[Kind, deque[float]] = OrderedDict()

    def most(self, num_tokens: int) -> int:
        """Pages that a row can take, however its tokens are tiered."""
        return self._shape.num_heads * self._shape.layout.max_pages(num_tokens)

    def observe(self, thresholds: Thresholds, num_tokens: int, num_pages: int) -> None:
        """Learn the size of a row."""
        kind = thresholds, num_tokens.bit_length()
        seen = self._seen.setdefault(kind, deque(maxlen=SEEN))
        seen.append(num_pages / self.most(num_tokens))
        self._seen.move_to_end(kind)
        if len(self._seen) > MOST_KINDS:
            self._seen.popitem(last=False)

    def expected(self, thresholds: Thresholds, num_tokens: int) -> int:
        """Pages that a row will take: until its kind is known, with `HIGH_SHARE` of its tokens high."""
        most = self.most(num_tokens)
        # all high: nothing is decided
        if self._worst or thresholds == Thresholds():
            return most
        seen = self._seen.get((thresholds, num_tokens.bit_length()), ())
        if len(seen) < FEWEST_SEEN:
            return min(most, self._assumed(num_tokens))
        return min(most, math.ceil(max(seen) * MARGIN * most))

    def _assumed(self, num_tokens: int) -> int:
        tiers = self._shape.layout.tiers
        shares = (1.0,) if len(tiers) == 1 else (HIGH_SHARE, 1 - HIGH_SHARE)
        return self._shape.num_heads * sum(
            math.ceil(share * num_tokens / tier.tokens_per_page)
            for share, tier in zip(shares, tiers, strict=True)
        )
