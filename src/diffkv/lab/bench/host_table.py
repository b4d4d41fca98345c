"""The same page management on the host, to compare with: a table in numpy, by hand or vectorised.

It decides and accounts as `plan_decode` does for a step without free-form details: the least mean of a
head's high tokens against the threshold, the demoted token's place in the low tier, and a page from the
free list where a tier's last page is full. What it leaves out, a copy of the tables to the device, would
only add to its time.
"""

import numpy as np

__all__ = ["HostTable"]

HIGH, LOW = 0, 1


class HostTable:
    """Sums, tiers and pages of R requests with L layers of H heads and N tokens each.

    Args:
        shape: (R, L, H, N).
        tokens_per_page: of the high and the low tier.
        high_share: of the tokens.
        alpha_high: threshold.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        tokens_per_page: tuple[int, int],
        high_share: float,
        alpha_high: float,
    ) -> None:
        rng = np.random.default_rng(0)
        self._means = rng.random(shape, dtype=np.float32)
        self._is_high = rng.random(shape, dtype=np.float32) < high_share
        self._threshold = np.float32(alpha_high / shape[3])
        high = self._is_high.sum(3)
        self._counts = np.stack([high, shape[3] - high], -1).astype(np.int64)
        self._per_page = tokens_per_page
        self._pages = -(-self._counts // np.array(tokens_per_page))
        num_pages = int(self._pages.sum()) + 4 * high.size
        self._free = rng.permutation(num_pages)
        self._next = 0
        width = int(self._pages.max()) + 4
        self._table = np.full((*shape[:3], 2, width), -1, dtype=np.int32)

    def step_numpy(self) -> None:
        """A decode step for all requests, layers and heads at once."""
        means = np.where(self._is_high, self._means, np.inf)
        victims = means.argmin(3)
        least = np.take_along_axis(means, victims[..., None], 3)[..., 0]
        demoted = least < self._threshold
        tier = np.where(demoted, LOW, HIGH)
        where = (*np.indices(demoted.shape), tier)
        page, full = self._pages[where], np.array(self._per_page)[tier]
        needs = self._counts[where] == page * full
        self._counts[where] += 1
        index = tuple(axis[needs] for axis in where)
        taken = self._free[self._next : self._next + len(index[0])]
        self._next = (self._next + len(taken)) % (len(self._free) // 2)
        self._table[(*index, np.minimum(page[needs], self._table.shape[4] - 1))] = taken
        self._pages[index] += 1

    def step_python(self) -> None:
        """The same, head by head, as a page table of objects would."""
        requests, layers, heads, _ = self._means.shape
        for r in range(requests):
            for layer in range(layers):
                for head in range(heads):
                    self._one_head(r, layer, head)

    def _one_head(self, request: int, layer: int, head: int) -> None:
        row = (request, layer, head)
        means = np.where(self._is_high[row], self._means[row], np.inf)
        tier = LOW if means[means.argmin()] < self._threshold else HIGH
        place = (*row, tier)
        page = int(self._pages[place])
        if int(self._counts[place]) == page * self._per_page[tier]:
            self._table[(*place, min(page, self._table.shape[4] - 1))] = self._free[self._next]
            self._next = (self._next + 1) % (len(self._free) // 2)
            self._pages[place] += 1
        self._counts[place] += 1
