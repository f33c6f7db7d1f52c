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
class AlignmentResult:
    """Align(V, W) and cosine over a set of images. A mean over nothing is NaN.

    Attributes:
        align_px: Align(V, W): mean over regions of the intersection over union by area.
        align_px_per_image: mean over images of each image's mean.
        align_tokens: as `align_px`, over whole tokens.
        align_tokens_per_image: as `align_px_per_image`, over whole tokens.
        cosine: mean over regions of the cosine with their own label.
        cosine_per_image: mean over images of each image's mean.
        shuffled_cosine: mean over regions of the cosine with another region's label.
        images: images that had at least one region.
        regions: regions seen.
        regions_px: regions that the scores by area count.
        regions_tokens: regions that the scores by token and the cosines count.
        regions_outside: regions outside the model's image; no score counts them.
        regions_without_token: regions inside that cover no token; only the scores by area count them.
        regions_shuffled: regions that the shuffled cosine counts.
    """

    align_px: float
    align_px_per_image: float
    align_tokens: float
    align_tokens_per_image: float
    cosine: float
    cosine_per_image: float
    shuffled_cosine: float
    images: int
    regions: int
    regions_px: int
    regions_tokens: int
    regions_outside: int
    regions_without_token: int
    regions_shuffled: int


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

    def alignment(self) -> AlignmentResult:
        """The means."""
        sums = {name: self.sums_per_image(name) for name in ("iou_px", "iou_tokens", "cosine", "shuffled_cosine")}
        counted = {name: int(counts.sum()) for name, (_, counts) in sums.items()}
        return AlignmentResult(
            align_px=mean_over_regions(*sums["iou_px"]),
            align_px_per_image=mean_over_images(*sums["iou_px"]),
            align_tokens=mean_over_regions(*sums["iou_tokens"]),
            align_tokens_per_image=mean_over_images(*sums["iou_tokens"]),
            cosine=mean_over_regions(*sums["cosine"]),
            cosine_per_image=mean_over_images(*sums["cosine"]),
            shuffled_cosine=mean_over_regions(*sums["shuffled_cosine"]),
            images=len(np.unique(self.image)),
            regions=len(self.image),
            regions_px=counted["iou_px"],
            regions_tokens=counted["iou_tokens"],
            regions_outside=len(self.image) - counted["iou_px"],
            regions_without_token=counted["iou_px"] - counted["iou_tokens"],
            regions_shuffled=counted["shuffled_cosine"],
        )


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


def mean_over_regions(sums: np.ndarray, counts: np.ndarray) -> float:
    """Mean of a score where every region weighs the same; NaN over nothing."""
    return float(sums.sum() / counts.sum()) if counts.any() else float("nan")


def mean_over_images(sums: np.ndarray, counts: np.ndarray) -> float:
    """Mean of a score's means over each image's regions, where every image weighs the same; NaN over nothing."""
    some = counts > 0
    return float((sums[some] / counts[some]).mean()) if some.any() else float("nan")
