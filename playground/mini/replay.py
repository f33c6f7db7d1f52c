"""The annotation pipeline with the regions of a PAD file in the models' place: what comes out must be what went in.

Whatever differs is the fault of the machinery around the models. `scripts/compare_pad.py` compares.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pycocotools import mask as coco_mask

from llava.command import clear_errors, typer_app
from patch_aligned.annotate.manifest import list_images
from patch_aligned.annotate.options import SAM3_BOX_THRESHOLD, CandidateThresholds, SegmenterName, Selection, Workload
from patch_aligned.annotate.pipeline import ImageInWork
from patch_aligned.annotate.regions import Candidate, Mask, Tag
from patch_aligned.annotate.run import AnnotationJob, run_annotate, statuses_named
from patch_aligned.files import sha256_of
from patch_aligned.pad import Region, read_annotations

app = typer_app()


class ReplayStages:
    """Answers from a PAD file, which is held in memory. Images that it doesn't have get no tags."""

    # All candidates are selected: true boxes may overlap.
    selection = Selection(box_threshold=0, nms_iou=1, label_mode="best_tag", min_box_area_px=0)
    segment_candidates = False

    def __init__(self, pad: Path) -> None:
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
        return [[self._candidate(region, item) for region in self._regions(item)] for item in items]

    def segment(self, items: Sequence[ImageInWork]) -> list[list[Mask]]:
        """The regions' masks."""
        return [[self._mask(region, item) for region in self._regions(item)] for item in items]

    def _regions(self, item: ImageInWork) -> tuple[Region, ...]:
        image = self._images.get(item.image_id)
        if image is None:
            return ()
        if image.size_wh != item.image.size:
            raise ValueError(
                f"{self._pad}: (image_id {item.image_id!r}), field 'size': found {list(image.size_wh)}, expected "
                f"{list(item.image.size)} as the picture has. Give the --image_folder that the file was made for"
            )
        return image.regions

    def _candidate(self, region: Region, item: ImageInWork) -> Candidate:
        return Candidate(region.bbox_xyxy_px, 1.0, region.tag, 1.0, ((region.tag, 1.0),))

    def _mask(self, region: Region, item: ImageInWork) -> Mask:
        width, height = item.image.size
        area = coco_mask.area({"size": [height, width], "counts": region.rle_mask.encode("ascii")})
        return Mask(rle_mask=region.rle_mask, area_px=int(area), predicted_iou=1.0)


class ReplaySam3(ReplayStages):
    """The same in SAM 3's place: candidates come with their masks, overlap by them, and can be reselected."""

    selection = Selection(box_threshold=SAM3_BOX_THRESHOLD, min_box_area_px=0)
    segment_candidates = True

    def __init__(self, pad: Path) -> None:
        super().__init__(pad)
        self.settings["sam3"] = {"candidate_thresholds": CandidateThresholds()._asdict()}
        self.settings["selection"] = asdict(self.selection)

    def segment(self, items: Sequence[ImageInWork]) -> list[list[Any]]:
        """The masks that came with the candidates."""
        return [[item.candidates[place].mask for place in item.to_segment] for item in items]

    def _candidate(self, region: Region, item: ImageInWork) -> Candidate:
        return Candidate(region.bbox_xyxy_px, 1.0, region.tag, 1.0, (), self._mask(region, item))

    def _mask(self, region: Region, item: ImageInWork) -> Mask:
        mask = super()._mask(region, item)
        return Mask(rle_mask=mask["rle_mask"], area_px=mask["area_px"], presence=1.0)


@app.command()
@clear_errors
def replay(
    context: typer.Context,
    images: Annotated[Path, typer.Option(metavar="PATH", help="A folder of images, or a list of them.")],
    pad: Annotated[Path, typer.Option(metavar="PAD", help="The regions of these images.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="For manifest, settings and shards.")],
    segmenter: Annotated[SegmenterName, typer.Option(help="In whose place the regions stand.")] = "gdino+sam",
    image_folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What the paths of a list count from. Needed for a list.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images a shard.")] = 2000,
    retry: Annotated[
        str | None, typer.Option(metavar="STATUS[,STATUS]", help="Annotate records of these statuses again.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Record shards of which no image is there, as if all were lost.")
    ] = False,
) -> None:
    """Runs the pipeline of `patch-aligned annotate` with the tags, boxes and masks of a PAD file.

    Example:

    `python -m playground.mini.replay --images scenes/train.json --image_folder scenes --pad scenes/pad.json
    --output runs/replay`
    """
    statuses = statuses_named(retry)
    entries, root = list_images(images, image_folder)
    workload = Workload(allow_missing=allow_missing)
    stages = ReplaySam3 if segmenter == "sam3" else ReplayStages
    job = AnnotationJob(entries, root, output, lambda device: stages(pad), workload, shard_size, statuses)
    run_annotate(job, device="cpu")


if __name__ == "__main__":
    sys.exit(app())
