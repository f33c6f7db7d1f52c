"""The images that a measure runs over: which regions count, which labels they are compared with, which are shown.

The file is read twice: once for the labels alone, once with the images, which stream by. Of all images together nothing
is kept but one label a region.

Letters: R regions of an image.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from llava.mm_utils import UnreadableImageError, load_rgb_image
from patch_aligned.analysis.annotated_sets import AnnotatedSet, open_annotated_set
from patch_aligned.analysis.embeddings import Tower
from patch_aligned.analysis.localisation_figure import PictureRow
from patch_aligned.analysis.shuffled_labels import permute_labels
from patch_aligned.annotations import AnnotatedImage, Region
from patch_aligned.dataset.image_files import image_path
from patch_aligned.patch_masks import token_coverage_of_regions


@dataclass(frozen=True)
class MeasureSettings:
    """What decides the numbers, beside the data and the weights.

    Attributes:
        data: file of annotated images, in any of `annotated_sets.FORMATS`.
        image_folder: folder that its image ids are relative to.
        threshold_rule: name of a rule of `alignment.THRESHOLD_RULES`.
        min_coverage: share of a token's cell from which on it counts as covered.
        limit: only so many images; None for all.
        subset: which: the `first` of the file, or a `random` choice that hangs on `seed` and the images' ids.
        region_kind: only regions whose extra key `kind` has this value; None for all.
        seed: of the shuffled labels, and of a random subset.
        batch_size: images in a forward pass; no number depends on it.
        picture_rows: images kept for the picture.
        data_format: of `data`.
        on_error: what an image does that is missing, broken, or of another size than its record's: `fail` stops,
            `skip` leaves it out of the set, as if it had never been there, and lists it.
    """

    data: Path
    image_folder: Path
    threshold_rule: str = "mid_range"
    min_coverage: float = 0.5
    limit: int | None = None
    region_kind: str | None = None
    seed: int = 0
    batch_size: int = 8
    picture_rows: int = 4
    data_format: str = "auto"
    subset: Literal["first", "random"] = "first"
    on_error: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class Survey:
    """What must be known of all images before the first is measured.

    Attributes:
        annotated: the images.
        images: how many there are.
        labels: all different labels of selected regions, in the order in which they come.
        own: for each selected region, in order, the index of its label.
        shuffled: for each selected region the index of the label it is compared with as a control, -1 where there is
            none; see `permute_labels`.
        pictured: positions of the images that the picture shows, spread evenly over those with regions.
    """

    annotated: Iterable[AnnotatedImage]
    images: int
    labels: list[str]
    own: Tensor
    shuffled: Tensor
    pictured: frozenset[int]

    @classmethod
    def of(cls, annotated: Iterable[AnnotatedImage], settings: MeasureSettings) -> Survey:
        """Reads all records once, and looks whether their images are there.

        Raises:
            FileNotFoundError: images are missing.
            ValueError: no region is selected, or an image's path leads out of the image folder.
        """
        index_of_label: dict[str, int] = {}
        own = array("q")
        showable: list[int] = []
        kinds: set[str] = set()
        images = missing = 0
        first_missing: Path | None = None
        for image in annotated:
            path = image_path(settings.image_folder, image.image_id)
            if not path.is_file():
                missing, first_missing = missing + 1, first_missing or path
            tags = [region.tag for region in _selected(image, settings)]
            kinds |= {str(region.extra["kind"]) for region in image.regions if "kind" in region.extra}
            own.extend(index_of_label.setdefault(tag, len(index_of_label)) for tag in tags)
            if tags:
                showable.append(images)
            images += 1
        if missing:
            raise FileNotFoundError(
                f"{settings.data}: {missing:,} of {images:,} images are missing, the first is {first_missing}. Pass "
                "the --image-folder that its paths are relative to, or leave them out with --on_error skip."
            )
        if not own:
            chosen = f" of kind {settings.region_kind!r} (kinds in the file: {sorted(kinds) or 'none'})"
            raise ValueError(
                f"{settings.data}: no regions{chosen if settings.region_kind else ''} in {images} images, so nothing "
                "can be aligned. Pass --data a PAD file whose records have labels."
            )
        rows = min(settings.picture_rows, len(showable))
        pictured = frozenset(showable[(2 * row + 1) * len(showable) // (2 * rows)] for row in range(rows))
        sources = permute_labels(own, settings.seed)
        shuffled = [-1 if source is None else own[source] for source in sources]
        return cls(annotated, images, list(index_of_label), torch.tensor(own), torch.tensor(shuffled), pictured)


def open_images(settings: MeasureSettings) -> AnnotatedSet:
    """The images that `settings` choose; with `on_error="skip"` all are decoded once to find those left out.

    Raises:
        ValueError: see `open_annotated_set`, or every image would be left out.
        FileNotFoundError: there is no such file.
    """
    annotated = open_annotated_set(settings.data, settings.image_folder, settings.data_format)
    if settings.limit is not None and settings.subset == "random":
        annotated = annotated.random_subset(settings.limit, settings.seed)
    elif settings.limit is not None:
        annotated = annotated.first(settings.limit)
    if settings.on_error == "fail":
        return annotated
    annotated = annotated.without(_broken_images(annotated, settings.image_folder))
    if annotated.broken and next(iter(annotated), None) is None:
        first = next(iter(annotated.broken.values()))
        raise ValueError(
            f"{settings.data}: none of its {len(annotated.broken):,} images can be measured. The first: {first}. Is "
            f"--image-folder {settings.image_folder} the right one?"
        )
    return annotated


def _broken_images(annotated: Iterable[AnnotatedImage], image_folder: Path) -> dict[str, str]:
    broken = {}
    for image in annotated:
        path = image_path(image_folder, image.image_id)
        try:
            file_wh = load_rgb_image(path).size
        except (FileNotFoundError, UnreadableImageError) as error:
            broken[image.image_id] = str(error)
        else:
            if file_wh != image.size_wh:
                broken[image.image_id] = f"{path}: found {list(file_wh)} pixels, its record says {list(image.size_wh)}"
    return broken


class MeasuredImage:
    """One image with its regions, as all projectors read it.

    Attributes:
        pixels: `[3, side, side]`, as the tower sees it.
        own, shuffled: `[R]`, see `Survey`.
        picture: the row that the picture shows of it, or None.
    """

    def __init__(
        self,
        annotated: AnnotatedImage,
        regions: Sequence[Region],
        own: Tensor,
        shuffled: Tensor,
        tower: Tower,
        settings: MeasureSettings,
    ):
        self.own, self.shuffled = own, shuffled
        self._annotated, self._regions = annotated, regions
        self._rle_masks = [region.rle_mask for region in regions]
        self._record = f"{settings.data}: {annotated.image_id}"
        self._tower = tower
        self._coverage: dict[tuple[int, int], Tensor] = {}
        try:
            image = load_rgb_image(image_path(settings.image_folder, annotated.image_id))
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{error}, or leave images like it out with --on_error skip") from error
        self._file_wh = image.size
        self.pixels = tower.pixels(image)  # [3, side, side]
        self.picture: PictureRow | None = None
        self.pictured_region = 0

    def areas_px(self) -> list[float]:
        """Area of each region in pixels of the original image."""
        size_hw = list(self._annotated.size_wh[::-1])
        encoded = [{"size": size_hw, "counts": rle_mask.encode()} for rle_mask in self._rle_masks]
        return coco_mask.area(encoded).tolist() if encoded else []

    def coverage(self, grid: tuple[int, int]) -> Tensor:
        """`[R, rows, cols]`, share of each token's cell that each region covers.

        Raises:
            PatchMaskError: the file's size is not the record's.
        """
        if grid not in self._coverage:
            geometry = self._tower.geometry(self._file_wh, grid)
            coverage = token_coverage_of_regions(self._rle_masks, self._annotated.size_wh, geometry, self._record)
            self._coverage[grid] = torch.from_numpy(coverage)
        return self._coverage[grid]

    def show(self) -> None:
        """Prepares a row of the picture: the region that is largest in the original image, whatever the tower.

        No score chooses what is shown, and towers that cut the image differently show the same.
        """
        self.coverage((1, 1))  # refuses a file of another size than its record's
        self.pictured_region = int(np.argmax(self.areas_px()))
        width, height = self._annotated.size_wh
        encoded = {"size": [height, width], "counts": self._rle_masks[self.pictured_region].encode()}
        truth = self._tower.geometry(self._file_wh, (1, 1)).mask_to_model(coco_mask.decode(encoded))  # [side, side]
        self.picture = PictureRow(
            image_id=self._annotated.image_id,
            label=self._regions[self.pictured_region].tag,
            image=self._tower.displayed(self.pixels),
            truth=torch.from_numpy(truth),
        )


def measured_images(settings: MeasureSettings, survey: Survey, tower: Tower) -> Iterator[MeasuredImage]:
    """Yields the images of `survey` in order, one at a time.

    Raises:
        OSError: an image is missing or broken.
        ValueError: an image's size is not its record's, or its path leads out of the image folder.
    """
    first_region = 0
    for index, annotated in enumerate(survey.annotated):
        regions = _selected(annotated, settings)
        of_image = slice(first_region, first_region + len(regions))
        first_region += len(regions)
        image = MeasuredImage(annotated, regions, survey.own[of_image], survey.shuffled[of_image], tower, settings)
        if index in survey.pictured:
            image.show()
        yield image


def _selected(annotated: AnnotatedImage, settings: MeasureSettings) -> list[Region]:
    kind = settings.region_kind
    return [region for region in annotated.regions if kind is None or region.extra.get("kind") == kind]
