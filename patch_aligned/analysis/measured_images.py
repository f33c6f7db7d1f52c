"""The images that a measure runs over: which regions count, which labels they are compared with, which are shown.

The file is read twice: once for the labels alone, once with the images, which stream by. Of all images together nothing
is kept but one label a region.

Letters: R regions of an image.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from llava.mm_utils import load_rgb_image
from patch_aligned.analysis.alignment import permute_labels
from patch_aligned.analysis.embeddings import SharedTower
from patch_aligned.analysis.localisation_figure import PictureRow
from patch_aligned.annotations import AnnotatedImage, Region, read_annotations
from patch_aligned.patch_masks import token_coverage_of_regions


@dataclass(frozen=True)
class MeasureSettings:
    """What decides the numbers, beside the data and the weights.

    Attributes:
        data: PAD file.
        image_folder: folder that its image ids are relative to.
        threshold_rule: name of a rule of `alignment.THRESHOLD_RULES`.
        min_coverage: share of a token's cell from which on it counts as covered.
        limit: only the first so many images; None for all.
        region_kind: only regions whose extra key `kind` has this value; None for all.
        seed: of the shuffled labels.
        batch_size: images in a forward pass; no number depends on it.
        picture_rows: images kept for the picture.
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


@dataclass(frozen=True)
class Survey:
    """What must be known of all images before the first is measured.

    Attributes:
        images: how many there are.
        labels: of all selected regions, in order.
        sources: for each region the one whose label it is compared with as a control, see `permute_labels`.
        pictured: positions of the images that the picture shows, spread evenly over those with regions.
    """

    images: int
    labels: list[str]
    sources: list[int | None]
    pictured: frozenset[int]

    @classmethod
    def of(cls, settings: MeasureSettings) -> Survey:
        """Reads all records once.

        Raises:
            ValueError: no region is selected.
        """
        labels: list[str] = []
        showable: list[int] = []
        kinds: set[str] = set()
        images = 0
        for annotated in _annotations(settings):
            tags = [region.tag for region in _selected(annotated, settings)]
            kinds |= {str(region.extra["kind"]) for region in annotated.regions if "kind" in region.extra}
            labels += map(sys.intern, tags)
            if tags:
                showable.append(images)
            images += 1
        if not labels:
            chosen = f" of kind {settings.region_kind!r} (kinds in the file: {sorted(kinds) or 'none'})"
            raise ValueError(
                f"{settings.data}: no regions{chosen if settings.region_kind else ''} in {images} images, so nothing "
                "can be aligned. Pass --data a PAD file whose records have labels."
            )
        rows = min(settings.picture_rows, len(showable))
        pictured = frozenset(showable[(2 * row + 1) * len(showable) // (2 * rows)] for row in range(rows))
        return cls(images, labels, permute_labels(labels, settings.seed), pictured)


class MeasuredImage:
    """One image with its regions, as all projectors read it."""

    def __init__(
        self,
        annotated: AnnotatedImage,
        regions: Sequence[Region],
        shuffled: list[str | None],
        tower: SharedTower,
        settings: MeasureSettings,
    ):
        self.labels = [region.tag for region in regions]
        self.shuffled = shuffled
        self._annotated = annotated
        self._rle_masks = [region.rle_mask for region in regions]
        self._record = f"{settings.data}: {annotated.image_id}"
        self._tower = tower
        self._coverage: dict[tuple[int, int], Tensor] = {}
        image = load_rgb_image(_image_path(annotated, settings))
        self._file_wh = image.size
        self.pixels = tower.pixels(image)  # [3, side, side]
        self.picture: PictureRow | None = None
        self.pictured_region = 0

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
        """Prepares a row of the picture: the region with the largest area, so that no score chooses what is shown."""
        self.pictured_region = int(self.coverage((1, 1)).flatten().argmax())
        width, height = self._annotated.size_wh
        encoded = {"size": [height, width], "counts": self._rle_masks[self.pictured_region].encode()}
        truth = self._tower.geometry(self._file_wh, (1, 1)).mask_to_model(coco_mask.decode(encoded))  # [side, side]
        self.picture = PictureRow(
            image_id=self._annotated.image_id,
            label=self.labels[self.pictured_region],
            image=self._tower.displayed(self.pixels),
            truth=torch.from_numpy(truth),
        )


def measured_images(settings: MeasureSettings, survey: Survey, tower: SharedTower) -> Iterator[MeasuredImage]:
    """Yields the images of `survey` in order, one at a time.

    Raises:
        OSError: an image is missing or broken.
        ValueError: an image's size is not its record's, or its path leads out of the image folder.
    """
    first_region = 0
    for index, annotated in enumerate(_annotations(settings)):
        regions = _selected(annotated, settings)
        sources = survey.sources[first_region : first_region + len(regions)]
        first_region += len(regions)
        shuffled = [None if source is None else survey.labels[source] for source in sources]
        image = MeasuredImage(annotated, regions, shuffled, tower, settings)
        if index in survey.pictured:
            image.show()
        yield image


def _annotations(settings: MeasureSettings) -> Iterator[AnnotatedImage]:
    return islice(read_annotations(settings.data), settings.limit)


def _selected(annotated: AnnotatedImage, settings: MeasureSettings) -> list[Region]:
    kind = settings.region_kind
    return [region for region in annotated.regions if kind is None or region.extra.get("kind") == kind]


def _image_path(annotated: AnnotatedImage, settings: MeasureSettings) -> Path:
    """Path of an image, which data must not lead out of the image folder."""
    root = settings.image_folder.resolve()
    path = (root / annotated.image_id).resolve()
    if not path.is_relative_to(root):
        raise ValueError(
            f"{settings.data}: image_id {annotated.image_id!r} leads out of {settings.image_folder}; expected a path "
            "below it. Correct the record."
        )
    return path
