"""Read, validate and write the Patch-Aligned Dataset (PAD): one record per image, with its regions.

A record, as in the paper's Table 9:

    {"image_id": "00000/00000030.jpg", "size": [448, 336], "caption": "a canyon wall ...",
     "labels": [{"tag": "water", "bbox": [x1, y1, x2, y2], "rle_mask": "k5d4L5..."}]}

`size` is width and height in pixels. `bbox` is in pixels and may extend slightly beyond the image. `rle_mask` is
COCO's compressed RLE of a mask of the image's size. Files are a JSON array, JSON lines, either of them gzipped, or
Parquet. Additional keys are preserved.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from patch_aligned.masks import rle_problems
from patch_aligned.record_files import (
    EXTRA_KEY,
    iter_records,
    write_records,
)

_RECORD_KEYS = ("image_id", "size", "caption", "labels")
_LABEL_KEYS = ("tag", "bbox", "rle_mask")
_RECORDS_PER_CHECK = 64
_LONGEST_QUOTE = 80
_LARGEST_SIDE = 1 << 20  # pixels; beyond any image format, and its square is far from overflowing
_LARGEST_NUMBER = sys.float_info.max


class AnnotationError(ValueError):
    """Raised for a record that breaks the format.

    Attributes:
        record_index: zero-based index in the file; -1 for a record that is not from a file.
        image_id: the record's id, as far as it could be read.
        field, found, expected: parts of the message; empty if it has no such parts.
    """

    def __init__(
        self, message: str, record_index: int, image_id: str, *, field: str = "", found: str = "", expected: str = ""
    ) -> None:
        super().__init__(message)
        self.record_index = record_index
        self.image_id = image_id
        self.field, self.found, self.expected = field, found, expected


@dataclass(frozen=True)
class Region:
    """One annotated object.

    Attributes:
        tag: the label, in words.
        bbox_xyxy_px: corners in pixels of the original image; may extend slightly beyond it.
        rle_mask: COCO compressed RLE string of a mask of the image's size.
        extra: additional keys, unchanged.
    """

    tag: str
    bbox_xyxy_px: tuple[float, float, float, float]
    rle_mask: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnnotatedImage:
    """One record: an image, its caption and its regions, if any."""

    image_id: str
    size_wh: tuple[int, int]
    caption: str
    regions: tuple[Region, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    def coco_masks(self) -> list[dict[str, Any]]:
        """Return the regions' masks in pycocotools' format."""
        size_hw = list(self.size_wh[::-1])
        return [{"size": size_hw, "counts": region.rle_mask.encode()} for region in self.regions]

    def to_record(self) -> dict[str, Any]:
        """Convert to a record as stored in a file."""
        labels = [
            {"tag": region.tag, "bbox": list(region.bbox_xyxy_px), "rle_mask": region.rle_mask, **region.extra}
            for region in self.regions
        ]
        record = {"image_id": self.image_id, "size": list(self.size_wh), "caption": self.caption, "labels": labels}
        return {**record, **self.extra}


def read_annotations(
    path: str | Path, on_error: Callable[[AnnotationError], None] | None = None
) -> Iterator[AnnotatedImage]:
    """Yield the records of a file in order, validated. Only their ids are held in memory.

    Args:
        path: a `.json`, `.jsonl`, `.json.gz`, `.jsonl.gz` or `.parquet` file.
        on_error: called with each broken record, which is then skipped; None raises at the first. A second record of
            an image counts as broken, also under another spelling of its path.

    Raises:
        AnnotationError: for a record that breaks the format; names file, record, field, found and expected.
        RecordFileError: if the file itself cannot be read.
    """
    path = Path(path)
    index_of_id: dict[str, int] = {}
    for index, outcome in _checked(iter_records(path), path):
        if isinstance(outcome, AnnotatedImage):
            first = index_of_id.setdefault(normal_path(outcome.image_id), index)
            if first == index:
                yield outcome
                continue
            place = _Place(path, index, outcome.image_id)
            outcome = place.error("image_id", f"the id of record {first} again", "one record an image")
        if on_error is None:
            raise outcome
        on_error(outcome)


def parse_annotation(record: Mapping[str, Any], source: str | Path = "record") -> AnnotatedImage:
    """Validate one record that is not from a file, as `read_annotations` does.

    Raises:
        AnnotationError: if it breaks the format.
    """
    _, outcome = next(_checked([record], source, first_index=-1))
    if isinstance(outcome, AnnotationError):
        raise outcome
    return outcome


def write_annotations(images: Iterable[AnnotatedImage], path: str | Path) -> int:
    """Write a file atomically, in the format given by its suffix; returns the number of records.

    Raises:
        RecordFileError: for an unknown suffix.
    """
    return write_records((image.to_record() for image in images), Path(path))


def normal_path(image_id: str) -> str:
    """Normalise a path as annotation does for `image_id`: `./a.jpg` becomes `a.jpg`, `a//b.jpg` becomes `a/b.jpg`."""
    return str(PurePosixPath(image_id))


@dataclass(frozen=True)
class _Place:
    """The record that a value belongs to, for error messages."""

    source: str | Path
    index: int
    image_id: str

    def wrong(self, name: str, value: Any, expected: str, hint: str = "") -> NoReturn:
        raise self.error(name, _quoted(value), expected, hint)

    def require(self, keys: Iterable[str], mapping: Any, name: str) -> None:
        if not isinstance(mapping, Mapping):
            self.wrong(name, mapping, f"an object with the keys {', '.join(keys)}")
        for key in keys:
            if key not in mapping:
                present = _shortened(_printable(", ".join(map(str, mapping)))) or "no key at all"
                raise self.error(name, present, f"the key {key!r} too")

    def error(self, name: str, found: str, expected: str, hint: str = "") -> AnnotationError:
        record = f"record {self.index} " if self.index >= 0 else ""
        check = "; `patch-aligned verify` lists all that are broken" if self.index >= 0 else ""
        message = (
            f"{self.source}: {record}(image_id {self.image_id!r}), field {name!r}: found {found}; expected {expected}."
            f"{' ' + hint if hint else ''} Correct the record{check}."
        )
        return AnnotationError(message, self.index, self.image_id, field=name, found=found, expected=expected)


def _checked(
    records: Iterable[Any], source: str | Path, first_index: int = 0
) -> Iterator[tuple[int, AnnotatedImage | AnnotationError]]:
    """Yield each record's index with the parsed image, or with its error."""
    numbered = enumerate(records, start=first_index)
    while chunk := list(islice(numbered, _RECORDS_PER_CHECK)):
        outcomes: dict[int, AnnotatedImage | AnnotationError] = {}
        for index, record in chunk:
            try:
                outcomes[index] = _parse(record, source, index)
            except AnnotationError as error:
                outcomes[index] = error
        images = [(index, outcome) for index, outcome in outcomes.items() if isinstance(outcome, AnnotatedImage)]
        outcomes.update(_first_broken_masks(images, source))
        yield from outcomes.items()


def _parse(record: Any, source: str | Path, index: int) -> AnnotatedImage:
    """Run all checks except those of the masks' content, which are batched over records."""
    image_id = record.get("image_id", "?") if isinstance(record, Mapping) else "?"
    place = _Place(source, index, image_id if is_text(image_id) else _quoted(image_id))
    place.require(_RECORD_KEYS, record, "record")
    image_id, size, caption, labels = (record[key] for key in _RECORD_KEYS)
    if not is_text(image_id) or not image_id:
        place.wrong("image_id", image_id, "the image's path below the image folder")
    if image_id.startswith("/") or ".." in image_id.split("/") or "\0" in image_id:
        place.wrong("image_id", image_id, "a path that does not lead out of the image folder")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(map(is_side, size)):
        place.wrong("size", size, f"[width, height], two whole numbers of pixels, 1 to {_LARGEST_SIDE}")
    if not is_text(caption):
        place.wrong("caption", caption, "a string")
    if not isinstance(labels, list | tuple):
        place.wrong("labels", labels, "a list of {tag, bbox, rle_mask}; an empty list for an image without regions")
    for position, label in enumerate(labels):
        _check_label(label, f"labels[{position}]", place)
    _check_extra(record, _RECORD_KEYS, "", place)
    return image_of_record(record)


def _check_label(label: Any, where: str, place: _Place) -> None:
    place.require(_LABEL_KEYS, label, where)
    tag, bbox, rle_mask = (label[key] for key in _LABEL_KEYS)
    if not is_text(tag) or not tag.strip():
        place.wrong(f"{where}.tag", tag, "the label in words, not empty")
    if not isinstance(bbox, list | tuple) or len(bbox) != 4 or not all(map(is_finite_number, bbox)):
        place.wrong(f"{where}.bbox", bbox, "[x1, y1, x2, y2], four finite numbers in pixels")
    if bbox[2] < bbox[0] or bbox[3] < bbox[1]:
        place.wrong(f"{where}.bbox", bbox, "x1 <= x2 and y1 <= y2", "Is this [x, y, width, height]?")
    if not isinstance(rle_mask, str):
        hint = "Take the object's 'counts'." if isinstance(rle_mask, Mapping) else ""
        place.wrong(f"{where}.rle_mask", rle_mask, "a COCO compressed RLE string", hint)
    _check_extra(label, _LABEL_KEYS, f"{where}.", place)


def _check_extra(mapping: Mapping[str, Any], known: tuple[str, ...], prefix: str, place: _Place) -> None:
    """Require that JSON can express the additional keys."""
    extra = _extra(mapping, known)
    if EXTRA_KEY in extra:
        place.wrong(prefix + EXTRA_KEY, extra[EXTRA_KEY], "JSON text of an object; the key is Parquet's own")
    if extra and not _is_json(extra):
        key = next((key for key in extra if not _is_json({key: extra[key]})), "")
        place.wrong(
            prefix + _printable(str(key)), extra.get(key), "a value that JSON can express, not nested too deeply"
        )


def _extra(mapping: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in known} if len(mapping) > len(known) else {}


def image_of_record(record: Mapping[str, Any]) -> AnnotatedImage:
    """Build an image from a record that is known to be valid."""
    regions = []
    for label in record["labels"]:
        x1, y1, x2, y2 = map(float, label["bbox"])
        regions.append(Region(label["tag"], (x1, y1, x2, y2), label["rle_mask"], _extra(label, _LABEL_KEYS)))
    width, height = record["size"]
    extra = _extra(record, _RECORD_KEYS)
    return AnnotatedImage(record["image_id"], (width, height), record["caption"], tuple(regions), extra)


def _first_broken_masks(images: list[tuple[int, AnnotatedImage]], source: str | Path) -> dict[int, AnnotationError]:
    """Return the error of each record's first broken mask, by record index."""
    regions = [(index, image, position) for index, image in images for position in range(len(image.regions))]
    problems = rle_problems(
        [image.regions[position].rle_mask for _, image, position in regions],
        [image.size_wh[0] * image.size_wh[1] for _, image, _ in regions],
    )
    broken: dict[int, AnnotationError] = {}
    for (index, image, position), problem in zip(regions, problems, strict=True):
        if problem is not None and index not in broken:
            width, height = image.size_wh
            broken[index] = _Place(source, index, image.image_id).error(
                f"labels[{position}].rle_mask", problem, f"width x height = {width} x {height} = {width * height}"
            )
    return broken


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def is_text(value: Any) -> bool:
    """Whether a value is a string without lone surrogates, which JSON can express but UTF-8 files cannot hold."""
    return isinstance(value, str) and (value.isascii() or _printable(value) == value)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def is_side(number: Any) -> bool:
    """Whether a JSON value is a width or height in pixels."""
    return isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= _LARGEST_SIDE


def is_finite_number(number: Any) -> bool:
    """Whether a JSON value is a finite number: not NaN, not a boolean, and within the range of floats."""
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and -_LARGEST_NUMBER <= number <= _LARGEST_NUMBER


def _quoted(value: Any) -> str:
    try:
        return _shortened(repr(value))
    except (ValueError, RecursionError):  # a number too long, or a list too deep, to be printed
        return f"a {type(value).__name__} that cannot be printed"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."
