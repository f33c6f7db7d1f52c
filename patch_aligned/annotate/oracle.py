"""Stages that know the answer: tags, boxes and masks of a PAD file instead of models'.

What comes out of the pipeline must then be what the file says, so whatever differs is the machinery's fault.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from patch_aligned.annotate.candidates import Candidate
from patch_aligned.annotate.ram.tagger import Tag
from patch_aligned.annotate.sam import Mask
from patch_aligned.annotate.selection import Selected
from patch_aligned.annotate.stages import ImageInWork
from patch_aligned.annotations import Region, read_annotations
from patch_aligned.whole_files import sha256_of


class OracleError(ValueError):
    """An image of another size than the PAD file says."""


class OracleStages:
    """Answers from a PAD file, which is held in memory. Images that it doesn't have get no tags."""

    segment_candidates = False  # all of them are selected anyway

    def __init__(self, pad: Path) -> None:
        """Reads the file.

        Raises:
            AnnotationError: for a record that breaks the format.
            RecordFileError: if the file as such can't be read.
        """
        self._pad = pad
        self._images = {image.image_id: image for image in read_annotations(pad)}
        self.settings: dict[str, Any] = {"stages": "oracle", "pad_sha256": sha256_of(pad)}

    def tag(self, items: Sequence[ImageInWork]) -> list[list[Tag]]:
        """The regions' tags, each once."""
        return [
            [Tag(name, 1.0) for name in dict.fromkeys(region.tag for region in self._regions(item))] for item in items
        ]

    def bucket(self, item: ImageInWork) -> Hashable:
        """One for all."""
        return None

    def detect(self, items: Sequence[ImageInWork]) -> list[list[Candidate]]:
        """The regions' boxes."""
        return [
            [
                Candidate(region.bbox_xyxy_px, 1.0, region.tag, 1.0, ((region.tag, 1.0),))
                for region in self._regions(item)
            ]
            for item in items
        ]

    def select(self, item: ImageInWork) -> list[Selected]:
        """All of them: true boxes may overlap."""
        return [
            Selected(position, candidate, candidate.best_tag, candidate.best_tag)
            for position, candidate in enumerate(item.candidates)
        ]

    def segment(self, items: Sequence[ImageInWork]) -> list[list[Mask]]:
        """The regions' masks."""
        return [[self._mask(region, item) for region in self._regions(item)] for item in items]

    def _regions(self, item: ImageInWork) -> tuple[Region, ...]:
        image = self._images.get(item.image_id)
        if image is None:
            return ()
        if image.size_wh != item.image.size:
            raise OracleError(
                f"{self._pad}: (image_id {item.image_id!r}), field 'size': found {list(image.size_wh)}, expected "
                f"{list(item.image.size)} as the picture has. Give the --image_folder that the file was made for"
            )
        return image.regions

    def _mask(self, region: Region, item: ImageInWork) -> Mask:
        width, height = item.image.size
        area = coco_mask.area({"size": [height, width], "counts": region.rle_mask.encode("ascii")})
        return Mask(region.rle_mask, int(area), 1.0)
