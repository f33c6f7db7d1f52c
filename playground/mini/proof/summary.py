"""Statistics of the experiment: means over seeds, and intervals that hold scenes, names and seeds.

Letters: R regions of the test scenes, S seeds, N draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from patch_aligned.intervals import percentile_interval, resampled_over_seeds
from patch_aligned.tables import Cell, Table

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval: scenes and names are drawn for all seeds alike, and seeds if several."""

    value: float
    of_seed: tuple[float, ...]
    low: float
    high: float

    @property
    def cells(self) -> list[str]:
        """The mean, its interval and the seeds."""
        return [f"{self.value:.2f}", f"{self.low:.2f} … {self.high:.2f}", seeds_of(self.of_seed)]


def seeds_of(values: Sequence[float | None]) -> str:
    """Values of the seeds, one after the other; a dash where nothing could be counted."""
    return " / ".join("–" if value is None or math.isnan(value) else f"{value:z.2f}" for value in values)


def markdown(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts."""
    return Table("", columns, [[*map(Cell, row)] for row in rows]).markdown()


class Bootstrap:
    """Draws of scenes, names and seeds that all arms and scores share, so that differences are paired.

    `regions` is the frame of any run: all have the same regions in the same order, with `image` and `label`.
    """

    def __init__(self, regions: pd.DataFrame):
        generator = np.random.default_rng(0)
        self.weights = np.ones((DRAWS, len(regions)))  # [N, R]
        for column in ("image", "label"):
            codes, distinct = pd.factorize(regions[column])
            counts = generator.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), size=DRAWS)
            self.weights *= counts[:, codes]

    def mean(self, scores: Sequence[np.ndarray]) -> Estimate:
        """Mean of a score `[R]` of each seed; NaN where it is undefined."""
        return estimate_over_seeds([self._of_seed(score) for score in scores])

    def difference(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Estimate:
        """Mean of the scores `first` less that of `second`, seed by seed."""
        pairs = zip(map(self._of_seed, first), map(self._of_seed, second), strict=True)
        return estimate_over_seeds([(a - b, draws_a - draws_b) for (a, draws_a), (b, draws_b) in pairs])

    def _of_seed(self, score: np.ndarray) -> tuple[float, np.ndarray]:
        defined = ~np.isnan(score)
        weights = self.weights[:, defined]
        return float(score[defined].mean()), weights @ score[defined] / weights.sum(axis=1)


def estimate_over_seeds(found: Sequence[tuple[float, np.ndarray]]) -> Estimate:
    """Mean over seeds, and its interval, from each seed's value and its draws `[N]`."""
    of_seed = tuple(value for value, _ in found)
    draws = np.stack([draws for _, draws in found], axis=1)  # [N, S]
    low, high = percentile_interval(resampled_over_seeds(draws, seed=0))
    return Estimate(float(np.mean(of_seed)), of_seed, low, high)
