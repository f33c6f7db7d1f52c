"""The images and regions that an analysis measures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from llava.mm_utils import UnreadableImageError, load_rgb_image
from patch_aligned.analysis.regions import permute_labels, region_frame
from patch_aligned.annotated_sets import box_of_mask_xyxy_px, open_annotated_set
from patch_aligned.images import image_path
from patch_aligned.masks import areas_px
from patch_aligned.pad import AnnotatedImage, Region


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
