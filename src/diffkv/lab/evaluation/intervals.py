"""How sure a mean is."""

from collections.abc import Sequence

import numpy as np

__all__ = ["RESAMPLES", "interval"]

RESAMPLES = 2000


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The percentile-bootstrap interval of a mean; always the same for the same values.

    It cannot be wider than the values seen: of ten samples without a loss it is 0 to 0.

    Args:
        values: one a sample, at least one.
        confidence: share of intervals that hold the mean of all samples there could be.
    """
    array = np.asarray(values, dtype=float)
    rng = np.random.default_rng(0)
    means = array[rng.integers(0, len(array), (RESAMPLES, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
