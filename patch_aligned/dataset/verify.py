"""Check a PAD file beyond its format: boxes against images, masks against boxes, records against image files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from patch_aligned.cells import box_iou
from patch_aligned.images import ImageFileError, stored_size_wh
from patch_aligned.masks import areas_px
from patch_aligned.pad import AnnotatedImage, AnnotationError, Region, read_annotations
from patch_aligned.record_files import RecordFileError, is_finite_number, with_progress
from patch_aligned.tables import Cell, Table

Box = tuple[float, float, float, float]
CHECKS_OF_REGIONS = ("box without area", "box outside image", "empty mask", "mask against box", "score")
"""Checks that a model's output may fail although the file is valid."""

_EXAMPLES = 20  # of each check, in the report
_SUSPICIOUS_IOU = 0.5


@dataclass(frozen=True)
class VerifySettings:
    """What the checks allow."""

    image_folder: Path | None = None  # base of the ids, to check against the image files; None skips these checks
    box_tolerance: float = 0.05  # share of an image's width and height by which a box may extend beyond the image
    min_mask_box_iou: float = 0.1  # IoU of a region's box with the tightest box around its mask, at least


@dataclass(frozen=True)
class Problem:
    """Something wrong (`error`) or suspicious (`warning`) in one field of the file."""

    severity: Literal["error", "warning"]
    check: str
    record: int
    image_id: str
    field: str
    found: str
    expected: str

    def __str__(self) -> str:
        place = f"record {self.record} (image_id {self.image_id!r}), field {self.field!r}"
        return f"{place}: found {self.found}; expected {self.expected}"


@dataclass
class Verification:
    """What was read and what was found."""

    file: Path
    settings: VerifySettings
    records: int = 0  # all, including the invalid ones
    images: int = 0  # records with a valid format
    images_without_regions: int = 0
    regions: int = 0
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {"error": Counter(), "warning": Counter()})
    examples: dict[str, list[Problem]] = field(default_factory=dict)  # the first problems of each check

    @property
    def errors(self) -> int:
        """Number of errors."""
        return self.counts["error"].total()

    @property
    def errors_of_regions(self) -> int:
        """Errors of single regions: box, mask or score. The file as such is valid."""
        return sum(self.counts["error"][check] for check in CHECKS_OF_REGIONS)

    @property
    def warnings(self) -> int:
        """Number of warnings."""
        return self.counts["warning"].total()

    def add(self, problem: Problem) -> None:
        """Count a problem, and keep it as an example if it is among the first."""
        self.counts[problem.severity][problem.check] += 1
        examples = self.examples.setdefault(problem.check, [])
        if len(examples) < _EXAMPLES:
            examples.append(problem)


def verify_file(
    path: Path, settings: VerifySettings, on_problem: Callable[[Problem], None] = lambda problem: None
) -> Verification:
    """Check a file record by record; `on_problem` gets each problem.

    For a record of invalid format the first problem counts, and nothing else of it is checked. A file that cannot be
    read further, or has no records, is a problem too. `RecordFileError` is for a file that is missing.
    """
    found = Verification(path, settings)

    def add(problem: Problem) -> None:
        found.add(problem)
        on_problem(problem)

    def reject(error: AnnotationError) -> None:
        found.records += 1
        check = f"format of {re.sub(r'[0-9]+', '', error.field)}"
        place = (error.record_index, error.image_id, error.field)
        add(Problem("error", check, *place, error.found, error.expected))

    try:
        for image in with_progress(read_annotations(path, on_error=reject), "Verifying"):
            for problem in image_problems(image, found.records, settings):
                add(problem)
            found.records += 1
            found.images += 1
            found.images_without_regions += not image.regions
            found.regions += len(image.regions)
    except RecordFileError as error:
        if not path.is_file():
            raise
        add(Problem("error", "file", found.records, "?", "record", str(error), "a sound file"))
    if not found.records and not found.errors:
        add(Problem("error", "file", 0, "?", "record", "no record", "at least one image"))
    return found


def image_problems(image: AnnotatedImage, record: int, settings: VerifySettings) -> Iterator[Problem]:
    """Yield the problems of a valid record; `record` is its index in the file."""
    if settings.image_folder is not None:
        yield from _file_problems(image, record, settings.image_folder)
    encoded = image.coco_masks()
    areas = areas_px(encoded)  # [R]
    tight_xywh = coco_mask.toBbox(encoded) if encoded else np.zeros((0, 4))  # [R, 4]
    first_of: dict[Any, int] = {}
    for position, region in enumerate(image.regions):
        x, y, w, h = tight_xywh[position].tolist()
        tight = (x, y, x + w, y + h)
        for severity, check, key, value, expected in (
            *_box_problems(region, image.size_wh, settings.box_tolerance),
            *_mask_problems(region, int(areas[position]), tight, settings.min_mask_box_iou),
            *_score_problems(region),
        ):
            yield Problem(severity, check, record, image.image_id, f"labels[{position}].{key}", value, expected)
        first = first_of.setdefault((region.tag, region.rle_mask), position)
        if first != position:
            value = f"tag {region.tag!r} and mask of labels[{first}] again"
            place = (record, image.image_id, f"labels[{position}]")
            yield Problem("warning", "region twice", *place, value, "each region once")


_Finding = tuple[Literal["error", "warning"], str, str, str, str]  # severity, check, key, found, expected


def _box_problems(region: Region, size_wh: tuple[int, int], tolerance: float) -> Iterator[_Finding]:
    width, height = size_wh
    x1, y1, x2, y2 = region.bbox_xyxy_px
    found = _box_text(region.bbox_xyxy_px)
    if (x2 - x1) * (y2 - y1) == 0:
        yield "error", "box without area", "bbox", found, "x1 < x2 and y1 < y2"
    slack_x, slack_y = tolerance * width, tolerance * height
    if x1 < -slack_x or y1 < -slack_y or x2 > width + slack_x or y2 > height + slack_y:
        expected = f"a box in the image of {width} x {height}, which it may leave by {tolerance:.0%}"
        yield "error", "box outside image", "bbox", found, expected


def _mask_problems(region: Region, area: int, tight: Box, min_iou: float) -> Iterator[_Finding]:
    if area == 0:
        yield "error", "empty mask", "rle_mask", "a mask without a pixel", "at least one pixel"
        return
    iou = box_iou(tight, region.bbox_xyxy_px)
    found = f"a mask within {_box_text(tight)}, IoU {iou:.2f} with bbox {_box_text(region.bbox_xyxy_px)}"
    if iou < min_iou:
        yield "error", "mask against box", "rle_mask", found, f"IoU of at least {min_iou:g}"
    elif iou < _SUSPICIOUS_IOU:
        yield "warning", "mask against box", "rle_mask", found, f"IoU of at least {_SUSPICIOUS_IOU:g}"


def _score_problems(region: Region) -> Iterator[_Finding]:
    score = region.extra.get("score")
    if score is not None and not is_finite_number(score):
        yield "error", "score", "score", f"{score!r:.80}", "a finite number"


def _file_problems(image: AnnotatedImage, record: int, image_folder: Path) -> Iterator[Problem]:
    try:
        stored = stored_size_wh(image_folder, image.image_id)
    except ImageFileError as error:
        yield Problem("error", "image file", record, image.image_id, "image_id", error.found, error.expected)
        return
    if stored != image.size_wh:
        swapped = "width and height are swapped, or are those before its EXIF rotation"
        hint = swapped if stored == image.size_wh[::-1] else "another file or copy"
        found, expected = str(list(image.size_wh)), f"{list(stored)}, as the image file has it ({hint})"
        yield Problem("error", "image size", record, image.image_id, "size", found, expected)


def _box_text(box: Box) -> str:
    return "[" + ", ".join(f"{number:.1f}" for number in box) + "]"


# The report: all numbers as JSON, a page to read, and every problem as a line.


def as_json(found: Verification) -> dict[str, Any]:
    """The report: settings, counts, and the first problems of each check."""
    settings = asdict(found.settings)
    settings["image_folder"] = found.settings.image_folder.as_posix() if found.settings.image_folder else None
    return {
        "file": found.file.as_posix(),
        "settings": settings,
        "records": found.records,
        "images": found.images,
        "images_without_regions": found.images_without_regions,
        "regions": found.regions,
        "errors": found.errors,
        "warnings": found.warnings,
        "counts": found.counts,
        "examples": {check: [asdict(problem) for problem in problems] for check, problems in found.examples.items()},
    }


def as_table(found: Verification) -> Table:
    """The first example of each kind of problem and how many there are, errors first."""
    rows = []
    for severity, counts in found.counts.items():
        for check, count in counts.most_common():
            example = next((str(problem) for problem in found.examples[check] if problem.severity == severity), "")
            rows.append([Cell(severity), Cell(check), Cell(example), Cell(f"{count:,}")])
    return Table("Problems", ("severity", "check", "first", "number"), rows, text_columns=3)


def summary(found: Verification) -> str:
    """What was read and found, in two sentences."""
    checked = "the image files too" if found.settings.image_folder else "without the image files"
    return (
        f"{found.file}: {found.records:,} records, {found.images:,} of valid format, "
        f"{found.images_without_regions:,} without regions, {found.regions:,} regions; checked {checked}. "
        f"Errors: {found.errors:,}, warnings: {found.warnings:,}."
    )


def write_verification(path: Path, settings: VerifySettings, output: Path) -> Verification:
    """Verify a file and write `verify.json`, `verify.md` and `problems.jsonl` to the folder `output`."""
    if not path.is_file():
        raise RecordFileError(f"{path}: found no such file; expected a PAD file")
    output.mkdir(parents=True, exist_ok=True)
    with (output / "problems.jsonl").open("w", encoding="utf-8") as file:

        def write(problem: Problem) -> None:
            file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")

        found = verify_file(path, settings, write)
    text = json.dumps(as_json(found), indent=2, ensure_ascii=False)
    (output / "verify.json").write_text(text + "\n", encoding="utf-8")
    page = f"# Verification\n\n{summary(found)}\n"
    if found.examples:
        page += f"\n{as_table(found).markdown()}\n\nEvery problem is a line of `problems.jsonl`.\n"
    (output / "verify.md").write_text(page, encoding="utf-8")
    return found
