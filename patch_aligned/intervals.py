"""Confidence intervals by the bootstrap over groups of rows: over images, for scores of regions or of questions.

Rows of one image are alike, so images are resampled, not rows: as many as there are, with replacement, and the mean is
taken over all rows of the images drawn. Models that are resampled together see the same draws, so the interval of their
difference is paired.

Letters: I images, F metrics, N resamples.
"""

from __future__ import annotations

import numpy as np

_ELEMENTS_AT_ONCE = 1 << 22  # of a chunk of draws: 32 MB


def resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return means of metrics over resampled images.

    Args:
        sums: `[I, F]`, sum of each metric over an image's rows.
        counts: `[I, F]`, number of rows in that sum.
        resamples: N.
        seed: decides the draws, which are the same for all metrics.

    Returns:
        `[N, F]`; NaN where no row was drawn.
    """
    images = len(sums)
    generator = np.random.default_rng(seed)
    means = []
    chunk = max(1, _ELEMENTS_AT_ONCE // max(images, 1))
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        drawn = generator.integers(0, images, size=(rows, images))  # [rows, I]
        drawn += images * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((times @ sums) / (times @ counts))  # [rows, F]
    return np.concatenate(means) if means else np.empty((0, sums.shape[1]))


def percentile_interval(draws: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper end of the middle `confidence` of some draws `[N]`; NaN is left out, and given for no draw."""
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
