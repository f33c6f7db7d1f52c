"""Bootstrap confidence intervals that resample images, for scores of regions or questions.

Rows of one image are correlated, so images are resampled with replacement, not rows. Each draw takes the mean over all
rows of the drawn images. Models that are resampled together share the same draws, so the interval of their difference
is a paired one.

Letters: I images, F metrics, N resamples, S seeds of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

_ELEMENTS_AT_ONCE = 1 << 22  # per chunk of draws: 32 MB


@dataclass(frozen=True)
class Resampling:
    """How intervals are taken: number and seed of the draws of images, and the share of them in the interval."""

    resamples: int = 2000
    seed: int = 0
    confidence: float = 0.95


def resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Compute the means of metrics over resampled images.

    Args:
        sums: `[I, F]`, sum of each metric over an image's rows.
        counts: `[I, F]`, number of rows in that sum.
        resamples: N.
        seed: seed of the draws, which all metrics share.

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


def resampled_over_seeds(draws: np.ndarray, seed: int) -> np.ndarray:
    """Mean over seeds of training that are resampled too: draws `[N, S]`, one column a seed -> `[N]`."""
    chosen = np.random.default_rng((seed, 1)).integers(0, draws.shape[1], size=draws.shape)  # [N, S]
    return np.take_along_axis(draws, chosen, axis=1).mean(axis=1)


def percentile_interval(draws: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Return the ends of the middle `confidence` of draws `[N]`, ignoring NaN; (NaN, NaN) if there are no draws."""
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def ratios_of(sums: np.ndarray, counts: np.ndarray, resampling: Resampling, names: Sequence[str]) -> pd.DataFrame:
    """Ratios of sums and counts over all images, `[I, F]` each: a row for each of the F names, as in `metrics_of`."""
    draws = resampled_ratios(sums, counts, resampling)  # [N, F]
    rows = []
    for column in range(len(names)):
        low, high = percentile_interval(draws[:, column], resampling.confidence)
        value = ratio_of(sums[:, column], counts[:, column])
        rows.append({"value": value, "low": low, "high": high, "images": int((counts[:, column] > 0).sum())})
    return pd.DataFrame(rows, index=pd.Index(names, name="metric"))


def resampled_ratios(sums: np.ndarray, counts: np.ndarray, resampling: Resampling) -> np.ndarray:
    """Resampled means `[N, F]` over the images that count; no draw if these are fewer than two."""
    some = (counts > 0).any(axis=1)
    resamples = resampling.resamples if some.sum() > 1 else 0
    return resampled_means(sums[some], counts[some], resamples, resampling.seed)


def ratio_of(sums: np.ndarray, counts: np.ndarray) -> float:
    """Return the mean over all images; NaN where no row counts."""
    return float(sums.sum() / counts.sum()) if counts.any() else float("nan")


def wilson_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of the share of hits among independent trials, at least one."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = hits / trials, z * z / trials
    middle, half = share + weight / 2, z * (share * (1 - share) / trials + weight / (4 * trials)) ** 0.5
    return max((middle - half) / (1 + weight), 0.0), min((middle + half) / (1 + weight), 1.0)
