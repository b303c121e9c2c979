"""Long series made short enough to draw: thinned without losing a peak, and smoothed."""

import numpy as np

BUCKETS = 800  # more than a screen has pixels for a chart to show


def thin(values: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Ascending indices of at most 2 * buckets + 2 of the values: the first, the last, and the smallest and largest of
    each of so many equal parts. A part without a finite value keeps one index, so that a gap stays a gap."""
    if len(values) <= 2 * buckets + 2:
        return np.arange(len(values))
    finite = np.isfinite(values)
    low, high = np.where(finite, values, np.inf), np.where(finite, values, -np.inf)
    edges = np.linspace(0, len(values), buckets + 1).astype(int)
    kept = {0, len(values) - 1}
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        kept |= {begin + int(np.argmin(low[begin:end])), begin + int(np.argmax(high[begin:end]))}
    return np.array(sorted(kept))


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Means of the finite values among the `width` around each, NaN where there is none. Fewer at both ends: at the
    first, where curves are steep, as many on either side."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    half = np.minimum(width // 2, places)
    begin, end = places - half, np.minimum(places + half + 1, len(values))
    number = counts[end] - counts[begin]
    return np.where(number > 0, (sums[end] - sums[begin]) / np.maximum(number, 1), np.nan)


def limits(values: np.ndarray, share: float = 0.005) -> tuple[float, float] | None:
    """What to show of the values: all but so large a share at each end, with a margin; None if none is finite."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = (float(value) for value in np.quantile(finite, [share, 1 - share], method="inverted_cdf"))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
