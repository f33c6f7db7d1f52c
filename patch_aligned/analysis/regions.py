"""Scores of regions as one data frame, and what is taken from it: metrics with intervals, by size and label, compared.

The frame has a row for each region and model:

- `model`: name of the model.
- `image`: position of the image in the set, categorical over all images, since some have no region.
- `label`: categorical over all labels of the set.
- `size`: `small`, `medium` or `large`, categorical; `area_px`: area in pixels of the original image.
- `in_caption`: whether the caption names the region, where the file says so; else None.
- one column for each of `SCORES`, NaN where a score is undefined.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from patch_aligned.analysis.alignment import SCORES_BY_AREA, SCORES_BY_TOKEN, THRESHOLD_RULES
from patch_aligned.intervals import Resampling, percentile_interval, ratio_of, ratios_of, resampled_ratios

SCORES_BY_NAME = ("name_bound", "name_information", "name_auc")
"""Scores of names, see `names`: at the largest region of a name in a picture, and NaN where no LLM was run."""

MEASURED_SCORES = (*SCORES_BY_AREA, *SCORES_BY_TOKEN)
SCORES = (*MEASURED_SCORES, *SCORES_BY_NAME)

SIZE_LIMITS_PX = (32**2, 96**2)
"""COCO's bounds between small, medium and large regions, pixels of the original image."""

SIZES = ("small", "medium", "large")


class Metric(NamedTuple):
    """A mean of a score: over regions, or over the means of images; and its rule in words."""

    score: str
    per_image: bool
    rule: str


METRICS: dict[str, Metric] = {
    "align_px": Metric(
        "iou_px", False, "mean over regions of the IoU by area of the tokens above the threshold {threshold_rule}"
    ),
    "align_px_per_image": Metric("iou_px", True, "as align_px, mean over images of each image's mean (equation 4)"),
    "shuffled_align_px": Metric(
        "shuffled_iou_px", False, "as align_px, with another region's label: labels permuted over the set, seed {seed}"
    ),
    **{
        f"align_px_{rule}": Metric(
            f"iou_px_{rule}", False, f"as align_px, with the threshold {rule} whatever is chosen"
        )
        for rule in THRESHOLD_RULES
    },
    "align_tokens": Metric(
        "iou_tokens",
        False,
        "mean over regions of the IoU over whole tokens, threshold {threshold_rule}, a token is covered from "
        "{min_coverage} of its cell on",
    ),
    "align_tokens_per_image": Metric("iou_tokens", True, "as align_tokens, mean over images of each image's mean"),
    "average_precision_px": Metric(
        "average_precision_px",
        False,
        "mean over regions of the average precision of the cosine map by area; no threshold, ties are one step, a "
        "constant map scores the region's share of the model's image",
    ),
    "pointing": Metric(
        "pointing",
        False,
        "share of regions that cover the token of highest cosine, from {min_coverage} of its cell on; where tokens "
        "tie, the covered share of them",
    ),
    "cosine": Metric(
        "cosine",
        False,
        "mean over regions of the cosine between the mean of the tokens covered from {min_coverage} of the cell on and "
        "the mean word embedding of the label's tokens",
    ),
    "cosine_per_image": Metric("cosine", True, "as cosine, mean over images of each image's mean"),
    "shuffled_cosine": Metric(
        "shuffled_cosine", False, "as cosine, with another region's label: labels permuted over the set, seed {seed}"
    ),
    "other_cosine": Metric(
        "other_cosine", False, "as cosine, with all other labels of the set instead of the own, each counting alike"
    ),
    "contrast": Metric("contrast", False, "mean over regions of cosine less other_cosine"),
    "retrieval_top1": Metric(
        "top1",
        False,
        "share of regions whose own label is the nearest of all {label_count} labels of the set by cosine; where "
        "labels tie, the chance that it is",
    ),
    "retrieval_top5": Metric("top5", False, "as retrieval_top1, among the five nearest"),
    "best_word_cosine": Metric(
        "best_word_cosine", False, "as cosine, with the nearest word of the LLM's whole table instead of the label"
    ),
    "name_bound": Metric(
        "name_bound",
        False,
        "mean over names and pictures that show them of log p(name after the picture) less the log of its mean over "
        "all pictures; nats, 0 is blind",
    ),
    "name_information": Metric(
        "name_information",
        False,
        "as name_bound, log of the number of names less the NLL of the name among them; nats, 0 is an even guess",
    ),
    "name_auc": Metric(
        "name_auc",
        False,
        "chance that a name which a picture shows has a higher log p than an absent one, each less its mean over "
        "pictures; 0.5 is blind",
    ),
}
"""All metrics by name. `rules_of` fills the settings of a run into their rules."""

HEADLINES = (
    "align_px", "average_precision_px", "pointing", "cosine", "contrast", "retrieval_top1", "retrieval_top5",
    "name_bound", "name_auc",
)  # fmt: skip
"""The metrics of breakdowns by size, label and caption."""


def rules_of(threshold_rule: str, min_coverage: float, seed: int, label_count: int) -> dict[str, str]:
    """Return the rule of every metric in words, with the settings of a run."""
    settings = {
        "threshold_rule": threshold_rule,
        "min_coverage": min_coverage,
        "seed": seed,
        "label_count": label_count,
    }
    return {name: metric.rule.format(**settings) for name, metric in METRICS.items()}


def region_frame(
    image: np.ndarray,
    images: int,
    label: Sequence[int],
    labels: Sequence[str],
    area_px: np.ndarray,
    in_caption: Sequence[bool | None] | None = None,
) -> pd.DataFrame:
    """The columns that all models share, from the position of each region's image and the index of its label."""
    size = np.searchsorted(SIZE_LIMITS_PX, area_px, side="right")  # at a bound: the larger
    return pd.DataFrame(
        {
            "image": pd.Categorical.from_codes(image, categories=range(images)),
            "label": pd.Categorical.from_codes(label, categories=labels),
            "size": pd.Categorical.from_codes(size, categories=SIZES, ordered=True),
            "area_px": area_px.astype(np.float64),
            "in_caption": pd.Series(in_caption or [None] * len(image), dtype="boolean"),
            **dict.fromkeys(SCORES_BY_NAME, np.nan),
        }
    )


def metrics_of(regions: pd.DataFrame, resampling: Resampling, names: Sequence[str] = tuple(METRICS)) -> pd.DataFrame:
    """Metrics of one model's regions, with intervals by the bootstrap over images.

    Args:
        regions: rows of the frame.
        resampling: how intervals are taken.
        names: of `METRICS`.

    Returns:
        A row for each metric: `value` (NaN over nothing), `low` and `high` (NaN where there are fewer than two images),
        and how many `regions` and `images` count.
    """
    found = ratios_of(*_per_image(regions, names), resampling, names)
    found.insert(3, "regions", [int(regions[METRICS[name].score].notna().sum()) for name in names])
    return found


def metrics_by_size(
    regions: pd.DataFrame, resampling: Resampling, names: Sequence[str] = HEADLINES
) -> dict[str, pd.DataFrame]:
    """Metrics of the small, medium and large regions."""
    parts = {size: regions[regions["size"] == size] for size in SIZES}
    return {size: metrics_of(_own_images(part), resampling, names) for size, part in parts.items()}


def metrics_by_caption(
    regions: pd.DataFrame, resampling: Resampling, names: Sequence[str] = HEADLINES
) -> dict[str, pd.DataFrame]:
    """Metrics of the regions that captions name and of the others; nothing where the file does not tell them apart."""
    parts = {"in the caption" if named else "not named": part for named, part in regions.groupby("in_caption")}
    return {name: metrics_of(_own_images(part), resampling, names) for name, part in parts.items()}


def metrics_by_label(
    regions: pd.DataFrame, resampling: Resampling, names: Sequence[str] = HEADLINES
) -> dict[str, pd.DataFrame]:
    """Metrics of each label's regions, the most frequent label first; only the label's own images are drawn."""
    parts = dict(iter(regions.groupby("label", observed=True)))
    by_frequency = sorted(parts, key=lambda label: (-len(parts[label]), label))
    return {label: metrics_of(_own_images(parts[label]), resampling, names) for label in by_frequency}


def differences(
    first: pd.DataFrame, second: pd.DataFrame, resampling: Resampling, names: Sequence[str] = tuple(METRICS)
) -> pd.DataFrame:
    """Metrics of the regions `first` less those of `second`, which are of the same images in the same order.

    Returns:
        A row for each metric: `value`, `low` and `high` of its paired interval, and `share_above_zero` of the draws.

    Raises:
        ValueError: the rows are of different regions.
    """
    images = [frame["image"].cat.codes.to_numpy() for frame in (first, second)]
    counts_of_images = [len(frame["image"].cat.categories) for frame in (first, second)]
    if counts_of_images[0] != counts_of_images[1] or not np.array_equal(*images):
        raise ValueError(
            f"Scores of {len(first)} regions in {counts_of_images[0]} images and of {len(second)} in "
            f"{counts_of_images[1]} cannot be compared: measure both projectors on the same set."
        )
    of_both = [_per_image(frame, names) for frame in (first, second)]
    sums, counts = (np.hstack(parts) for parts in zip(*of_both, strict=True))  # [I, 2 F] each
    draws = resampled_ratios(sums, counts, resampling)
    draws = draws[:, : len(names)] - draws[:, len(names) :]  # [N, 2 F] -> [N, F]
    values = [ratio_of(sums[:, column], counts[:, column]) for column in range(2 * len(names))]
    rows = []
    for column in range(len(names)):
        defined = draws[:, column][~np.isnan(draws[:, column])]
        low, high = percentile_interval(defined, resampling.confidence)
        rows.append(
            {
                "value": values[column] - values[len(names) + column],
                "low": low,
                "high": high,
                "share_above_zero": float((defined > 0).mean()) if len(defined) else float("nan"),
            }
        )
    return pd.DataFrame(rows, index=pd.Index(names, name="metric"))


def count_regions(regions: pd.DataFrame) -> dict[str, int]:
    """Count what a model's metrics are taken from, and what they leave out.

    Regions outside the model's image count in no metric; those inside that cover no token count in metrics by area
    alone. `images_without_token` have regions, none of which covers a token.
    """
    inside, covering = regions["iou_px"].notna(), regions["cosine"].notna()
    images = regions["image"].nunique()
    return {
        "images_with_regions": images,
        "images_without_token": images - regions["image"][covering].nunique(),
        "regions": len(regions),
        "regions_outside": int((~inside).sum()),
        "regions_without_token": int((inside & ~covering).sum()),
    }


def mean_and_sd(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds, and the standard deviation of a sample (NaN for one seed); NaN where a seed's value is."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {"mean": float(np.mean(values)), "sd": sd}


def _own_images(part: pd.DataFrame) -> pd.DataFrame:
    return part.assign(image=part["image"].cat.remove_unused_categories())


def _per_image(regions: pd.DataFrame, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of each image, `[I, F]` each: a metric is the sum of the sums over the sum of the counts."""
    image, images = regions["image"].cat.codes.to_numpy(), len(regions["image"].cat.categories)
    sums, counts = np.zeros((2, images, len(names)))
    for column, name in enumerate(names):
        scores = regions[METRICS[name].score].to_numpy()
        defined = ~np.isnan(scores)
        sums[:, column] = np.bincount(image[defined], weights=scores[defined], minlength=images)
        counts[:, column] = np.bincount(image[defined], minlength=images)
        if METRICS[name].per_image:  # the image's mean, once
            sums[:, column] /= np.maximum(counts[:, column], 1)
            counts[:, column] = np.minimum(counts[:, column], 1)
    return sums, counts


def permute_labels(labels: Sequence[Hashable], seed: int) -> list[int | None]:
    """Permute labels among regions so that each region gets a label that is not its own, as a control for cosines.

    A projector that sends everything to one direction near all words has a high cosine with the right label, and the
    same with a wrong one.

    Args:
        labels: one label a region, over the whole set.
        seed: seed of the permutation.

    Returns:
        For each region the index of the region whose label it gets, each index at most once. `None` where there is none
        left: more than half of the regions share one label, so some can only get their own.
    """
    order = list(range(len(labels)))
    generator = random.Random(seed)
    # Groups of equal labels lie together, the groups and the regions within each in random order.
    generator.shuffle(order)
    rank = {label: generator.random() for label in dict.fromkeys(labels)}
    largest = max(Counter(labels).values(), default=0)
    order.sort(key=lambda index: rank[labels[index]])
    # A turn by the size of the largest group leads every region out of its own group, unless that group is more than
    # half of all; then those that come back to it have nowhere to go.
    chosen: list[int | None] = [None] * len(labels)
    for position, index in enumerate(order):
        source = order[(position + largest) % len(order)]
        if labels[source] != labels[index]:
            chosen[index] = source
    return chosen
