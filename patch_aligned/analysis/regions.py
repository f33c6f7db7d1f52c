"""Figures from the scores of regions: means with intervals and rules, broken down, and compared between projectors."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from patch_aligned.analysis.alignment import THRESHOLD_RULES, RegionScores
from patch_aligned.intervals import percentile_interval, resampled_means

# The scores of all regions of a stream of images, a row a region: what means, intervals and breakdowns are taken from.
#
# Of an image nothing is kept but these numbers, about a hundred bytes a region, so that a set of any size fits.

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


SIZE_LIMITS_PX = (32**2, 96**2)
"""COCO's bounds between small, medium and large regions, pixels of the original image."""

SIZES = ("small", "medium", "large")


class FigureKind(NamedTuple):
    """How a figure comes from scores: which, what weighs the same, and the rule in words."""

    score: str
    per_image: bool
    rule: str


FIGURES: dict[str, FigureKind] = {
    "align_px": FigureKind(
        "iou_px", False, "mean over regions of the IoU by area of the tokens above the threshold {threshold_rule}"
    ),
    "align_px_per_image": FigureKind("iou_px", True, "as align_px, mean over images of each image's mean"),
    **{
        f"align_px_{rule}": FigureKind(
            f"iou_px_{rule}", False, f"as align_px, with the threshold {rule} whatever is chosen"
        )
        for rule in THRESHOLD_RULES
    },
    "align_tokens": FigureKind(
        "iou_tokens",
        False,
        "mean over regions of the IoU over whole tokens, threshold {threshold_rule}, a token is covered from "
        "{min_coverage} of its cell on",
    ),
    "align_tokens_per_image": FigureKind("iou_tokens", True, "as align_tokens, mean over images of each image's mean"),
    "average_precision_px": FigureKind(
        "average_precision_px",
        False,
        "mean over regions of the average precision of the cosine map by area; no threshold, ties are one step, a "
        "constant map scores the region's share of the model's image",
    ),
    "pointing": FigureKind(
        "pointing",
        False,
        "share of regions that cover the token of highest cosine, from {min_coverage} of its cell on; where tokens "
        "tie, the covered share of them",
    ),
    "cosine": FigureKind(
        "cosine",
        False,
        "mean over regions of the cosine between the mean of the tokens covered from {min_coverage} of the cell on and "
        "the mean word embedding of the label's tokens",
    ),
    "cosine_per_image": FigureKind("cosine", True, "as cosine, mean over images of each image's mean"),
    "shuffled_cosine": FigureKind(
        "shuffled_cosine", False, "as cosine, with another region's label: labels permuted over the set, seed {seed}"
    ),
    "other_cosine": FigureKind(
        "other_cosine", False, "as cosine, with all other labels of the set instead of the own, each counting alike"
    ),
    "contrast": FigureKind("contrast", False, "mean over regions of cosine less other_cosine"),
    "retrieval_top1": FigureKind(
        "top1",
        False,
        "share of regions whose own label is the nearest of all {label_count} labels of the set by cosine; where "
        "labels tie, the chance that it is",
    ),
    "retrieval_top5": FigureKind("top5", False, "as retrieval_top1, among the five nearest"),
}
"""All figures by name; the rules are filled in with the settings of a run by `rules_of`."""

HEADLINES = ("align_px", "average_precision_px", "pointing", "cosine", "contrast", "retrieval_top1", "retrieval_top5")
"""The figures that breakdowns show."""


@dataclass(frozen=True)
class Figure:
    """A mean with its bootstrap interval over images.

    Attributes:
        value: the mean; NaN over nothing.
        low, high: ends of the interval; NaN where there are fewer than two images.
        regions, images: how many count.
    """

    value: float
    low: float
    high: float
    regions: int
    images: int


@dataclass(frozen=True)
class Difference:
    """A figure of one projector less that of another, over the same draws of images.

    Attributes:
        value: the difference.
        low, high: ends of its paired interval.
        share_above_zero: share of the draws in which it is above 0.
    """

    value: float
    low: float
    high: float
    share_above_zero: float


@dataclass(frozen=True)
class Resampling:
    """How intervals are taken: draws of images, and the share of them that the interval holds."""

    resamples: int = 2000
    seed: int = 0
    confidence: float = 0.95


def rules_of(threshold_rule: str, min_coverage: float, seed: int, label_count: int) -> dict[str, str]:
    """The rule behind every figure, in words, with the settings of a run."""
    return {
        name: kind.rule.format(
            threshold_rule=threshold_rule, min_coverage=min_coverage, seed=seed, label_count=label_count
        )
        for name, kind in FIGURES.items()
    }


def figures_of(rows: RegionRows, resampling: Resampling, names: Sequence[str] = tuple(FIGURES)) -> dict[str, Figure]:
    """Figures of some regions, with intervals.

    Args:
        rows: the regions.
        resampling: how intervals are taken.
        names: of `FIGURES`.
    """
    sums, counts = _per_image(rows, names)  # [I, F] each
    draws = _draws(sums, counts, resampling)  # [N, F]
    return {
        name: Figure(
            _mean(sums[:, column], counts[:, column]),
            *percentile_interval(draws[:, column], resampling.confidence),
            regions=int((~np.isnan(rows.scores[FIGURES[name].score])).sum()),
            images=int((counts[:, column] > 0).sum()),
        )
        for column, name in enumerate(names)
    }


def figures_by_size(
    rows: RegionRows, resampling: Resampling, names: Sequence[str] = HEADLINES
) -> dict[str, dict[str, Figure]]:
    """Figures of the small, medium and large regions, by their area in pixels of the original image as COCO has it."""
    size = np.searchsorted(SIZE_LIMITS_PX, rows.area_px, side="right")  # at a bound: the larger
    return {name: figures_of(rows.chosen(size == index), resampling, names) for index, name in enumerate(SIZES)}


def figures_by_label(
    rows: RegionRows, labels: Sequence[str], resampling: Resampling, names: Sequence[str] = HEADLINES
) -> dict[str, dict[str, Figure]]:
    """Figures of each label's regions, the most frequent label first; only the label's own images are drawn from."""
    order = np.argsort(rows.label, kind="stable")
    starts = np.searchsorted(rows.label[order], np.arange(len(labels) + 1))
    counts = np.diff(starts).tolist()
    present = [index for index, count in enumerate(counts) if count]
    return {
        labels[index]: figures_of(rows.chosen(order[starts[index] : starts[index + 1]]), resampling, names)
        for index in sorted(present, key=lambda index: (-counts[index], labels[index]))
    }


def differences(
    first: RegionRows, second: RegionRows, resampling: Resampling, names: Sequence[str] = tuple(FIGURES)
) -> dict[str, Difference]:
    """Figures of `first` less those of `second`, on the same images in the same order.

    Raises:
        ValueError: the rows are of different regions.
    """
    if first.images != second.images or not np.array_equal(first.image, second.image):
        raise ValueError(
            f"Scores of {len(first.image)} regions in {first.images} images and of {len(second.image)} in "
            f"{second.images} cannot be compared: measure both projectors on the same set."
        )
    of_both = [_per_image(rows, names) for rows in (first, second)]
    sums, counts = (np.hstack(parts) for parts in zip(*of_both, strict=True))  # [I, 2 F] each
    draws = _draws(sums, counts, resampling)
    draws = draws[:, : len(names)] - draws[:, len(names) :]  # [N, 2 F] -> [N, F]
    values = [_mean(sums[:, column], counts[:, column]) for column in range(2 * len(names))]
    found = {}
    for column, name in enumerate(names):
        defined = draws[:, column][~np.isnan(draws[:, column])]
        found[name] = Difference(
            values[column] - values[len(names) + column],
            *percentile_interval(defined, resampling.confidence),
            share_above_zero=float((defined > 0).mean()) if len(defined) else float("nan"),
        )
    return found


def _per_image(rows: RegionRows, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of each image, `[I, F]` each: the figure is the sum of the sums over the sum of the counts."""
    sums, counts = np.zeros((2, rows.images, len(names)))
    for column, name in enumerate(names):
        of_image, regions = rows.sums_per_image(FIGURES[name].score)
        if FIGURES[name].per_image:  # the image's mean, once
            of_image, regions = of_image / np.maximum(regions, 1), np.minimum(regions, 1)
        sums[:, column], counts[:, column] = of_image, regions
    return sums, counts


def _draws(sums: np.ndarray, counts: np.ndarray, resampling: Resampling) -> np.ndarray:
    """Resampled means `[N, F]` over the images that count; no draw at all where these are fewer than two."""
    some = (counts > 0).any(axis=1)
    resamples = resampling.resamples if some.sum() > 1 else 0
    return resampled_means(sums[some], counts[some], resamples, resampling.seed)


def _mean(sums: np.ndarray, counts: np.ndarray) -> float:
    return float(sums.sum() / counts.sum()) if counts.any() else float("nan")


# A control for cosines: every region with the label of another.


def permute_labels(labels: Sequence[Hashable], seed: int) -> list[int | None]:
    """Permutes labels among regions so that each region gets a label that is not its own.

    Against this control a cosine can be judged: a projector that sends everything to one direction near all words has a
    high cosine with the right label, and the same with a wrong one.

    Args:
        labels: one label a region, over the whole set.
        seed: seed of the permutation.

    Returns:
        For each region the index of the region whose label it gets, each index at most once. `None` where the
        permutation must end: more than half of the regions share one label, so some can only get their own.
    """
    order = list(range(len(labels)))
    generator = random.Random(seed)
    # Groups of equal labels lie together, the groups and the regions within each in random order.
    generator.shuffle(order)
    rank = {label: generator.random() for label in dict.fromkeys(labels)}
    counts = Counter(labels)
    largest = max(counts.values(), default=0)
    order.sort(key=lambda index: rank[labels[index]])
    # A turn by the size of the largest group leads every region out of its own group, unless that group is more than
    # half of all; then those that come back to it have nowhere to go.
    chosen: list[int | None] = [None] * len(labels)
    for position, index in enumerate(order):
        source = order[(position + largest) % len(order)]
        if labels[source] != labels[index]:
            chosen[index] = source
    return chosen
