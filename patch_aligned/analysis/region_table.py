"""The scores of all regions of a stream of images, a row a region: what means, intervals and breakdowns are taken from.

Of an image nothing is kept but these numbers, about a hundred bytes a region, so that a set of any size fits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
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


class RegionTable:
    """Collects region scores image by image."""

    def __init__(self) -> None:
        self._scores = {name: array("d") for name in SCORES}
        self._image, self._label, self._area_px = array("q"), array("q"), array("d")
        self.images_seen = 0

    def update(self, scores: RegionScores, labels: Sequence[int] = (), areas_px: Sequence[float] = ()) -> None:
        """Adds the regions of one image, perhaps none.

        Args:
            scores: of the image's regions.
            labels: index of each region's label; needed for breakdowns only.
            areas_px: area of each region in pixels of the original image; needed for breakdowns only.
        """
        for name, column in self._scores.items():
            column.extend(getattr(scores, name).tolist())
        regions = len(scores.iou_px)
        self._image.extend([self.images_seen] * regions)
        self._label.extend(labels)
        self._area_px.extend(areas_px)
        self.images_seen += 1

    def __len__(self) -> int:
        return len(self._image)

    def score(self, name: str) -> np.ndarray:
        """A column of `SCORES`, float64 `[regions]`; NaN where undefined."""
        return np.array(self._scores[name], dtype=np.float64)

    @property
    def image(self) -> np.ndarray:
        """Index of each region's image among those seen, `[regions]`."""
        return np.array(self._image, dtype=np.int64)

    @property
    def label(self) -> np.ndarray:
        """Index of each region's label, `[regions]`."""
        return np.array(self._label, dtype=np.int64)

    @property
    def area_px(self) -> np.ndarray:
        """Area of each region in pixels of the original image, `[regions]`."""
        return np.array(self._area_px, dtype=np.float64)

    def sums_per_image(self, name: str, chosen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sum of a score and number of regions that have it, for every image seen: float64 `[images]` each.

        Args:
            name: of `SCORES`.
            chosen: bool `[regions]`, which regions count; None for all.
        """
        values = self.score(name)
        counted = ~np.isnan(values) if chosen is None else ~np.isnan(values) & chosen
        image = self.image[counted]
        sums = np.bincount(image, weights=values[counted], minlength=self.images_seen)
        return sums, np.bincount(image, minlength=self.images_seen).astype(np.float64)

    def alignment(self) -> AlignmentResult:
        """The means so far."""
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
            regions=len(self),
            regions_px=counted["iou_px"],
            regions_tokens=counted["iou_tokens"],
            regions_outside=len(self) - counted["iou_px"],
            regions_without_token=counted["iou_px"] - counted["iou_tokens"],
            regions_shuffled=counted["shuffled_cosine"],
        )


def mean_over_regions(sums: np.ndarray, counts: np.ndarray) -> float:
    """Mean of a score where every region weighs the same; NaN over nothing."""
    return float(sums.sum() / counts.sum()) if counts.any() else float("nan")


def mean_over_images(sums: np.ndarray, counts: np.ndarray) -> float:
    """Mean of a score's means over each image's regions, where every image weighs the same; NaN over nothing."""
    some = counts > 0
    return float((sums[some] / counts[some]).mean()) if some.any() else float("nan")
