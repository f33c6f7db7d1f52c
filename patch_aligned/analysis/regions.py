"""The regions that an analysis measures, their scores as one data frame, and the metrics that are taken from it.

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
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from llava.mm_utils import UnreadableImageError, load_rgb_image
from patch_aligned.analysis.alignment import SCORES_BY_AREA, SCORES_BY_TOKEN, THRESHOLD_RULES
from patch_aligned.annotated_sets import box_of_mask_xyxy_px, open_annotated_set
from patch_aligned.images import image_path
from patch_aligned.intervals import Resampling, percentile_interval, ratio_of, ratios_of, resampled_ratios
from patch_aligned.masks import areas_px
from patch_aligned.pad import AnnotatedImage, Region

SCORES_BY_NAME = ("name_bound", "name_information", "name_auc")
"""Scores of names, see `names`: at the largest region of a name in a picture, and NaN where no LLM was run."""

MEASURED_SCORES = (*SCORES_BY_AREA, *SCORES_BY_TOKEN)
SCORES = (*MEASURED_SCORES, *SCORES_BY_NAME)

SIZE_LIMITS_PX = (32**2, 96**2)
"""COCO's bounds between small, medium and large regions, pixels of the original image."""

SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class MeasureSettings:
    """What decides the numbers, beside the weights.

    Attributes:
        data: file of annotated images, in any of `annotated_sets.FORMATS`.
        image_folder: folder that its image ids are relative to.
        threshold_rule: name of a rule of `alignment.THRESHOLD_RULES`.
        positive_threshold: whether thresholds below 0 are raised to 0.
        min_coverage: share of a token's cell from which on it counts as covered.
        limit: only so many images; None for all.
        region_kind: only regions whose extra key `kind` has this value; None for all.
        region_unit: an annotated `instance` is a region, or all instances of a `label` in an image together.
        seed: of the shuffled labels, and of a random subset.
        batch_size: images in a forward pass; no number depends on it.
        picture_rows: images kept for the picture.
        data_format: of `data`.
        subset: the `first` images of the file, or a `random` choice that depends on `seed` and the images' ids.
        on_error: what to do with an image that is missing, broken, or of another size than its record's: `fail`, or
            `skip` it and list it, with the same numbers as if it had not been in the file.
    """

    data: Path
    image_folder: Path
    threshold_rule: str = "mid_range"
    positive_threshold: bool = False
    min_coverage: float = 0.5
    limit: int | None = None
    region_kind: str | None = None
    region_unit: Literal["instance", "label"] = "instance"
    seed: int = 0
    batch_size: int = 8
    picture_rows: int = 4
    data_format: str = "auto"
    subset: Literal["first", "random"] = "first"
    on_error: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class MeasuredSet:
    """The images that are measured. Their records are kept, their pixels are not: each pass opens the images again."""

    images: list[AnnotatedImage]  # with the regions that count
    format: str  # see `AnnotatedSet`
    skipped: Mapping[str, int]  # likewise
    broken: Mapping[str, str]  # images left out, by id, each with the reason
    labels: list[str]  # all different ones, in the order in which they come
    regions: pd.DataFrame  # see `region_frame`
    shuffled: Tensor  # [regions], index of the label that each is compared with as a control, -1 if there is none
    pictured: dict[int, int]  # region that the picture shows, by the position of its image


def read_set(settings: MeasureSettings) -> MeasuredSet:
    """Read the images that `settings` choose; with `on_error="skip"` all are decoded to find those left out."""
    annotated = open_annotated_set(settings.data, settings.image_folder, settings.data_format)
    images = annotated.choose(settings.limit, settings.subset, settings.seed)
    broken = _broken_images(images, settings.image_folder) if settings.on_error == "skip" else {}
    images = [image for image in images if image.image_id not in broken]
    if broken and not images:
        raise ValueError(
            f"{settings.data}: none of its {len(broken):,} images can be measured. The first: "
            f"{next(iter(broken.values()))}. Is --image-folder {settings.image_folder} the right one?"
        )
    paths = [image_path(settings.image_folder, image.image_id) for image in images]
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{settings.data}: {len(missing):,} of {len(images):,} images are missing, the first is {missing[0]}. Pass "
            "the --image-folder that its paths are relative to, or leave them out with --on_error skip."
        )
    kind = settings.region_kind
    if kind is not None:
        kinds = {str(region.extra["kind"]) for image in images for region in image.regions if "kind" in region.extra}
        images = [
            replace(image, regions=tuple(region for region in image.regions if region.extra.get("kind") == kind))
            for image in images
        ]
    if not any(image.regions for image in images):
        chosen = "" if kind is None else f" of kind {kind!r} (kinds in the file: {sorted(kinds) or 'none'})"
        raise ValueError(
            f"{settings.data}: no regions{chosen} in {len(images)} images, so nothing can be aligned. Pass --data a "
            "PAD file whose records have labels."
        )
    if settings.region_unit == "label":
        images = [replace(image, regions=_by_label(image)) for image in images]
    index_of_label: dict[str, int] = {}
    own = [index_of_label.setdefault(r.tag, len(index_of_label)) for image in images for r in image.regions]
    labels = list(index_of_label)
    sources = permute_labels(own, settings.seed)
    in_caption = [region.extra.get("in_caption") for image in images for region in image.regions]
    areas = [areas_px(image.coco_masks()) for image in images]
    positions = np.repeat(np.arange(len(images)), [len(image.regions) for image in images])
    with_regions = [position for position, image in enumerate(images) if image.regions]
    rows = min(settings.picture_rows, len(with_regions))
    spread = [with_regions[(2 * row + 1) * len(with_regions) // (2 * rows)] for row in range(rows)]
    return MeasuredSet(
        images=images,
        format=annotated.format,
        skipped=annotated.skipped,
        broken=broken,
        labels=labels,
        regions=region_frame(positions, len(images), own, labels, np.concatenate(areas), in_caption),
        shuffled=torch.tensor([-1 if source is None else own[source] for source in sources]),
        # The largest region in the original image: no score decides what is shown, nor does a tower's crop.
        pictured={position: int(np.argmax(areas[position])) for position in spread},
    )


def _by_label(image: AnnotatedImage) -> tuple[Region, ...]:
    """All masks of a label as one region, whose other keys are the first one's."""
    of_label: dict[str, list[tuple[Region, Any]]] = defaultdict(list)
    for region, mask in zip(image.regions, image.coco_masks(), strict=True):
        of_label[region.tag].append((region, mask))
    united = []
    for (first, *_), masks in (zip(*pairs, strict=True) for pairs in of_label.values()):
        rle_mask = coco_mask.merge(masks)["counts"].decode()
        united.append(replace(first, bbox_xyxy_px=box_of_mask_xyxy_px(rle_mask, image.size_wh), rle_mask=rle_mask))
    return tuple(united)


def _broken_images(images: Sequence[AnnotatedImage], image_folder: Path) -> dict[str, str]:
    broken = {}
    for image in images:
        path = image_path(image_folder, image.image_id)
        try:
            file_wh = load_rgb_image(path).size
        except (FileNotFoundError, UnreadableImageError) as error:
            broken[image.image_id] = str(error)
        else:
            if file_wh != image.size_wh:
                broken[image.image_id] = f"{path}: found {list(file_wh)} pixels, its record says {list(image.size_wh)}"
    return broken


def open_image(image: AnnotatedImage, settings: MeasureSettings) -> Image.Image:
    """Read the file of a record. Raises `OSError` if it is missing or broken."""
    try:
        return load_rgb_image(image_path(settings.image_folder, image.image_id))
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{error}, or leave images like it out with --on_error skip") from error


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


def permute_labels(labels: Sequence[Hashable], seed: int) -> list[int | None]:
    """Permute the labels of all regions so that each gets one that is not its own, as a control for cosines.

    A projector that sends everything to one direction near all words has a high cosine with the right label, and the
    same with a wrong one. Returns for each region the index of the region whose label it gets, each index at most once;
    `None` where more than half of the regions share one label, so that some can only get their own.
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


class Metric(NamedTuple):
    """A mean of a score over regions, or over the means of images; and its rule in words."""

    score: str
    rule: str
    per_image: bool = False


METRICS: dict[str, Metric] = {
    "align_px": Metric(
        "iou_px", "mean over regions of the IoU by area of the tokens above the threshold {threshold_rule}"
    ),
    "align_px_per_image": Metric("iou_px", "as align_px, mean over images of each image's mean (equation 4)", True),
    "shuffled_align_px": Metric(
        "shuffled_iou_px", "as align_px, with another region's label: labels permuted over the set, seed {seed}"
    ),
    **{
        f"align_px_{rule}": Metric(f"iou_px_{rule}", f"as align_px, with the threshold {rule} whatever is chosen")
        for rule in THRESHOLD_RULES
    },
    "align_tokens": Metric(
        "iou_tokens",
        "mean over regions of the IoU over whole tokens, threshold {threshold_rule}, a token is covered from "
        "{min_coverage} of its cell on",
    ),
    "align_tokens_per_image": Metric("iou_tokens", "as align_tokens, mean over images of each image's mean", True),
    "average_precision_px": Metric(
        "average_precision_px",
        "mean over regions of the average precision of the cosine map by area; no threshold, ties are one step, a "
        "constant map scores the region's share of the model's image",
    ),
    "pointing": Metric(
        "pointing",
        "share of regions that cover the token of highest cosine, from {min_coverage} of its cell on; where tokens "
        "tie, the covered share of them",
    ),
    "cosine": Metric(
        "cosine",
        "mean over regions of the cosine between the mean of the tokens covered from {min_coverage} of the cell on and "
        "the mean word embedding of the label's tokens",
    ),
    "cosine_per_image": Metric("cosine", "as cosine, mean over images of each image's mean", True),
    "shuffled_cosine": Metric(
        "shuffled_cosine", "as cosine, with another region's label: labels permuted over the set, seed {seed}"
    ),
    "other_cosine": Metric(
        "other_cosine", "as cosine, with all other labels of the set instead of the own, each counting alike"
    ),
    "contrast": Metric("contrast", "mean over regions of cosine less other_cosine"),
    "retrieval_top1": Metric(
        "top1",
        "share of regions whose own label is the nearest of all {label_count} labels of the set by cosine; where "
        "labels tie, the chance that it is",
    ),
    "retrieval_top5": Metric("top5", "as retrieval_top1, among the five nearest"),
    "best_word_cosine": Metric(
        "best_word_cosine", "as cosine, with the nearest word of the LLM's whole table instead of the label"
    ),
    "name_bound": Metric(
        "name_bound",
        "mean over names and pictures that show them of log p(name after the picture) less the log of its mean over "
        "all pictures; nats, 0 is blind",
    ),
    "name_information": Metric(
        "name_information",
        "as name_bound, log of the number of names less the NLL of the name among them; nats, 0 is an even guess",
    ),
    "name_auc": Metric(
        "name_auc",
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


def rules_of(**settings: Any) -> dict[str, str]:
    """Return the rule of every metric in words, with a run's threshold_rule, min_coverage, seed and label_count."""
    return {name: metric.rule.format(**settings) for name, metric in METRICS.items()}


def metrics_of(regions: pd.DataFrame, resampling: Resampling, names: Sequence[str] = tuple(METRICS)) -> pd.DataFrame:
    """Take metrics of one model's regions, with intervals by the bootstrap over images.

    Returns a row for each metric: `value` (NaN over nothing), `low` and `high` (NaN where there are fewer than two
    images), and how many `regions` and `images` count.
    """
    found = ratios_of(*_per_image(regions, names), resampling, names)
    found.insert(3, "regions", [int(regions[METRICS[name].score].notna().sum()) for name in names])
    return found


def breakdowns(regions: pd.DataFrame, resampling: Resampling) -> dict[str, dict[str, pd.DataFrame]]:
    """Take the headline metrics `by_size`, `by_label` and `by_caption`, each part with its own images alone.

    The most frequent label comes first. There are no parts by caption where the file does not tell regions apart.
    """
    labels = dict(iter(regions.groupby("label", observed=True)))
    named = {"in the caption" if is_named else "not named": part for is_named, part in regions.groupby("in_caption")}
    parts_by = {
        "by_size": {size: regions[regions["size"] == size] for size in SIZES},
        "by_label": {label: labels[label] for label in sorted(labels, key=lambda label: (-len(labels[label]), label))},
        "by_caption": named,
    }

    def headlines(part: pd.DataFrame) -> pd.DataFrame:
        own_images = part["image"].cat.remove_unused_categories()
        return metrics_of(part.assign(image=own_images), resampling, HEADLINES)

    return {by: {name: headlines(part) for name, part in parts.items()} for by, parts in parts_by.items()}


def differences(first: pd.DataFrame, second: pd.DataFrame, resampling: Resampling) -> pd.DataFrame:
    """Take the metrics of the regions `first` less those of `second`: a row each, with a paired interval.

    Columns are `value`, `low`, `high`, and `share_above_zero` of the draws. Raises `ValueError` if the rows are not of
    the same images in the same order.
    """
    images = [frame["image"].cat.codes.to_numpy() for frame in (first, second)]
    counts_of_images = [len(frame["image"].cat.categories) for frame in (first, second)]
    if counts_of_images[0] != counts_of_images[1] or not np.array_equal(*images):
        raise ValueError(
            f"Scores of {len(first)} regions in {counts_of_images[0]} images and of {len(second)} in "
            f"{counts_of_images[1]} cannot be compared: measure both projectors on the same set."
        )
    of_both = [_per_image(frame, tuple(METRICS)) for frame in (first, second)]
    sums, counts = (np.hstack(parts) for parts in zip(*of_both, strict=True))  # [I, 2 F] each
    ours, theirs = np.hsplit(resampled_ratios(sums, counts, resampling), 2)  # [N, F] each
    values = [ratio_of(*column) for column in zip(sums.T, counts.T, strict=True)]  # [2 F]
    rows = []
    for column, draws in enumerate((ours - theirs).T):
        low, high = percentile_interval(draws, resampling.confidence)
        above = pd.Series(draws).dropna().gt(0).mean()
        value = values[column] - values[column + len(METRICS)]
        rows.append({"value": value, "low": low, "high": high, "share_above_zero": above})
    return pd.DataFrame(rows, index=pd.Index(METRICS, name="metric"))


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
