"""The scores of all regions of a stream of images, a row a region: what means, intervals and breakdowns are taken from.

Of an image nothing is kept but these numbers, about a hundred bytes a region, so that a set of any size fits.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from patch_aligned.analysis.alignment import RegionScores

SCORES = tuple(field.name for field in fields(RegionScores))
"""Columns that hold a score, NaN where it is undefined."""


@dataclass(frozen=True)
class RegionRows:
    """Rows of a table, one a region, as columns.

    Attributes:
        scores: by the names of `SCORES`, float64 `[regions]` each; NaN where undefined.
        image: index of each region's image, int64 `[regions]`.
        label: index of each region's label, int64 `[regions]`; empty if the table was not told.
        area_px: area of each region in pixels of the original image, float64 `[regions]`; empty if not told.
        images: how many images there are; `image` is below it.
    """

    scores: Mapping[str, np.ndarray]
    image: np.ndarray
    label: np.ndarray
    area_px: np.ndarray
    images: int

    def chosen(self, rows: np.ndarray) -> RegionRows:
        """Some of the rows (indices or a mask), and only the images that these lie in, numbered anew."""
        left, image = np.unique(self.image[rows], return_inverse=True)
        scores = {name: column[rows] for name, column in self.scores.items()}
        return RegionRows(scores, image, self.label[rows], self.area_px[rows], len(left))

    def sums_per_image(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Sum of a score and number of regions that have it, for every image: float64 `[images]` each."""
        values = self.scores[name]
        defined = ~np.isnan(values)
        sums = np.bincount(self.image[defined], weights=values[defined], minlength=self.images)
        return sums, np.bincount(self.image[defined], minlength=self.images).astype(np.float64)


class RegionTable:
    """Collects region scores image by image."""

    def __init__(self) -> None:
        self._scores = {name: array("d") for name in SCORES}
        self._image, self._label, self._area_px = array("q"), array("q"), array("d")
        self._images = 0

    def update(self, scores: RegionScores, labels: Sequence[int] = (), areas_px: Sequence[float] = ()) -> None:
        """Adds the regions of one image, perhaps none.

        Args:
            scores: of the image's regions.
            labels: index of each region's label; needed for breakdowns only.
            areas_px: area of each region in pixels of the original image; needed for breakdowns only.
        """
        for name, column in self._scores.items():
            column.extend(getattr(scores, name).tolist())
        self._image.extend([self._images] * len(scores.iou_px))
        self._label.extend(labels)
        self._area_px.extend(areas_px)
        self._images += 1

    def rows(self) -> RegionRows:
        """All rows so far."""
        return RegionRows(
            scores={name: np.array(column, dtype=np.float64) for name, column in self._scores.items()},
            image=np.array(self._image, dtype=np.int64),
            label=np.array(self._label, dtype=np.int64),
            area_px=np.array(self._area_px, dtype=np.float64),
            images=self._images,
        )
