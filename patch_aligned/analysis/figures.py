"""Figures from the scores of regions: means with intervals and rules, broken down, and compared between projectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from patch_aligned.analysis.alignment import THRESHOLD_RULES
from patch_aligned.analysis.region_table import RegionRows
from patch_aligned.bootstrap import percentile_interval, resampled_means

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
