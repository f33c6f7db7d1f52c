"""Read, validate and write the Patch-Aligned Dataset (PAD): one record per image, with its regions.

A record, as in the paper's Table 9:

    {"image_id": "00000/00000030.jpg", "size": [448, 336], "caption": "a canyon wall ...",
     "labels": [{"tag": "water", "bbox": [x1, y1, x2, y2], "rle_mask": "k5d4L5..."}]}

`size` is width and height in pixels. `bbox` is in pixels and may extend slightly beyond the image. `rle_mask` is
COCO's compressed RLE of a mask of the image's size. Files are a JSON array, JSON lines, either of them gzipped, or
Parquet. Additional keys are preserved.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
from filelock import FileLock

from patch_aligned.files import written_whole
from patch_aligned.masks import rle_problems
from patch_aligned.record_files import (
    EXTRA_KEY,
    LARGEST_SIDE,
    PAD_SCHEMA,
    RecordFileError,
    batch_to_records,
    is_finite_number,
    is_json,
    is_side,
    is_text,
    iter_records,
    printable,
    quoted,
    records_to_batch,
    shortened,
    write_records,
)

_RECORD_KEYS = ("image_id", "size", "caption", "labels")
_LABEL_KEYS = ("tag", "bbox", "rle_mask")
_RECORDS_PER_CHECK = 64


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
        raise self.error(name, quoted(value), expected, hint)

    def require(self, keys: Iterable[str], mapping: Any, name: str) -> None:
        if not isinstance(mapping, Mapping):
            self.wrong(name, mapping, f"an object with the keys {', '.join(keys)}")
        for key in keys:
            if key not in mapping:
                present = shortened(printable(", ".join(map(str, mapping)))) or "no key at all"
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
    place = _Place(source, index, image_id if is_text(image_id) else quoted(image_id))
    place.require(_RECORD_KEYS, record, "record")
    image_id, size, caption, labels = (record[key] for key in _RECORD_KEYS)
    if not is_text(image_id) or not image_id:
        place.wrong("image_id", image_id, "the image's path below the image folder")
    if image_id.startswith("/") or ".." in image_id.split("/") or "\0" in image_id:
        place.wrong("image_id", image_id, "a path that does not lead out of the image folder")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(map(is_side, size)):
        place.wrong("size", size, f"[width, height], two whole numbers of pixels, 1 to {LARGEST_SIDE}")
    if not is_text(caption):
        place.wrong("caption", caption, "a string")
    if not isinstance(labels, list | tuple):
        place.wrong("labels", labels, "a list of {tag, bbox, rle_mask}; an empty list for an image without regions")
    for position, label in enumerate(labels):
        _check_label(label, f"labels[{position}]", place)
    _check_extra(record, _RECORD_KEYS, "", place)
    return _image_of(record)


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
    if extra and not is_json(extra):
        key = next((key for key in extra if not is_json({key: extra[key]})), "")
        place.wrong(
            prefix + printable(str(key)), extra.get(key), "a value that JSON can express, not nested too deeply"
        )


def _extra(mapping: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in known} if len(mapping) > len(known) else {}


def _image_of(record: Mapping[str, Any]) -> AnnotatedImage:
    """Build an image from a valid record."""
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


# Lookup of annotated images by path, outside the Python heap: memory-mapped Arrow records and a sorted hash table. The
# source file is validated and converted once. All processes map the same pages, so 558K images cost a worker almost no
# memory.

logger = logging.getLogger(__name__)

_FORMAT = "4"  # part of the cache key; increase it when the layout of the folder or a check changes
_ROWS_PER_BATCH = 256  # rows stored together on disk
_RECORDS, _REJECTED = "records.arrow", "rejected.jsonl"
_HASHES, _ROWS, _COUNTS = "hashes.npy", "rows.npy", "region_counts.npy"
_REJECTED_SHOWN = 5


class AnnotationIndex:
    """Index of the annotated images of one file, by `image_id`. Read-only, picklable and cheap to fork.

    Attributes:
        source: the file that was converted.
        folder: the conversion.
        rejected: number of broken records, which are skipped and listed in `folder / "rejected.jsonl"`.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        self._reader = pa.ipc.open_file(pa.memory_map(str(folder / _RECORDS)))
        self._hashes = np.load(folder / _HASHES, mmap_mode="r")  # [images] sorted
        self._rows = np.load(folder / _ROWS, mmap_mode="r")  # [images] row of each hash
        self._region_counts = np.load(folder / _COUNTS, mmap_mode="r")  # [images] by row
        with (folder / _REJECTED).open(encoding="utf-8") as file:
            self.rejected = sum(1 for _ in file)

    def __reduce__(self) -> tuple[Any, ...]:
        return AnnotationIndex, (self.source, self.folder)

    def __len__(self) -> int:
        return len(self._hashes)

    def __getitem__(self, row: int) -> AnnotatedImage:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.source}: row {row} of {len(self)}")
        batch = self._reader.get_batch(row // _ROWS_PER_BATCH).slice(row % _ROWS_PER_BATCH, 1)
        return _image_of(batch_to_records(batch)[0])

    @property
    def regions(self) -> int:
        """Total number of regions."""
        return int(self._region_counts.sum(dtype=np.int64))

    def find_region(self, number: int) -> tuple[AnnotatedImage, int]:
        """Return the image of a region and its place there; regions are numbered from 0 in the order of the file."""
        ends = np.cumsum(self._region_counts, dtype=np.int64)
        row = int(np.searchsorted(ends, number, side="right"))
        return self[row], int(number - ends[row] + self._region_counts[row])

    def tag_counts(self) -> Counter[str]:
        """Return the number of regions of each tag."""
        counts: Counter[str] = Counter()
        for number in range(self._reader.num_record_batches):
            counts.update(self._reader.get_batch(number).column("labels").flatten().field("tag").to_pylist())
        return counts

    def find(self, image_id: str) -> int | None:
        """Return the row of an image, or None if there is no record of it. `./a.jpg` finds `a.jpg`."""
        wanted = np.uint64(_hash(image_id))  # of the table's dtype, or searchsorted would convert the table
        position = int(np.searchsorted(self._hashes, wanted))
        while position < len(self) and self._hashes[position] == wanted:
            row = int(self._rows[position])
            batch = self._reader.get_batch(row // _ROWS_PER_BATCH)
            if normal_path(batch.column("image_id")[row % _ROWS_PER_BATCH].as_py()) == normal_path(image_id):
                return row
            position += 1
        return None

    def count_images_with_regions(self, image_ids: Iterable[str]) -> tuple[int, int]:
        """Return the number of `image_ids`, and how many of these images have at least one region."""
        has_regions = self.has_regions(image_ids)
        return len(has_regions), int(has_regions.sum())

    def has_regions(self, image_ids: Iterable[str]) -> np.ndarray:
        """Return which of `image_ids` have at least one region: bool `[images]`."""
        wanted = np.fromiter(map(_hash, image_ids), dtype=np.uint64)
        if not len(self):
            return np.zeros(len(wanted), dtype=bool)
        position = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
        return (self._hashes[position] == wanted) & (self._region_counts[self._rows[position]] > 0)

    def coverage_of(self, training_file: Path) -> tuple[int, int]:
        """Count a training file's images (PAD or LLaVA's JSON) and those with a region here. Cached on disk."""
        known = self.folder / f"coverage-{_identity(training_file)}.json"
        if known.is_file():
            asked, with_regions = json.loads(known.read_text())
            return int(asked), int(with_regions)
        image_ids = (image_id_of(record) for record in iter_records(training_file) if isinstance(record, dict))
        counts = self.count_images_with_regions(image_id for image_id in image_ids if image_id is not None)
        with written_whole(known) as temporary:
            temporary.write_text(json.dumps(counts))
        return counts

    def rejection_message(self) -> str:
        """Describe the rejected records: their number, the file that lists them, and the first errors."""
        first = "\n  ".join(self.rejections())
        return f"{self.source}: {self.rejected} broken records, all listed in {self.folder / _REJECTED}:\n  {first}"

    def rejections(self, limit: int = _REJECTED_SHOWN) -> list[str]:
        """Return the errors of the first rejected records."""
        with (self.folder / _REJECTED).open(encoding="utf-8") as file:
            return [json.loads(line)["error"] for line in islice(file, limit)]


def open_annotation_index(source: str | Path, cache_dir: str | Path | None = None) -> AnnotationIndex:
    """Open the index of a PAD file, and convert the file first if it is new or has changed.

    Several processes may call this at the same time: one converts, the others wait. Broken records are not in the
    index; see `rejected` and `rejections`. The caller decides how to handle them.

    Args:
        source: JSON, JSON lines (also gzipped) or Parquet.
        cache_dir: folder of conversions. Default: `$PATCH_ALIGNED_CACHE`, else `~/.cache/patch_aligned`.

    Raises:
        RecordFileError: if the file is missing or cannot be read.
    """
    source = Path(source).resolve()
    if not source.is_file():
        raise RecordFileError(f"{source}: found no such file; expected the PAD file that --patch_data_path names")
    root = Path(cache_dir) if cache_dir is not None else _default_cache_dir()
    folder = root / f"{source.name}-{_identity(source)}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _convert(source, folder)
    return AnnotationIndex(source, folder)


def _convert(source: Path, folder: Path) -> None:
    """Convert atomically: write to a temporary folder, then rename it to `folder`."""
    logger.info("Converting %s to %s (done once)", source, folder)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as parent:
        temporary = Path(parent) / folder.name
        temporary.mkdir()
        images = _write_conversion(source, temporary)
        if folder.name != f"{source.name}-{_identity(source)}":
            raise RecordFileError(f"{source}: changed while it was read; start again once it is completely written")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process converted it: locks may not work on network drives
                raise
    logger.info("Converted %d records of %s in %.0f s", images, source, time.monotonic() - started)


def _write_conversion(source: Path, folder: Path) -> int:
    hashes: list[int] = []
    region_counts: list[int] = []
    with (
        (folder / _REJECTED).open("w", encoding="utf-8") as rejected,
        pa.OSFile(str(folder / _RECORDS), "wb") as file,
        pa.ipc.new_file(file, PAD_SCHEMA) as writer,
    ):

        def reject(error: AnnotationError) -> None:
            entry = {"record": error.record_index, "image_id": error.image_id, "error": str(error)}
            rejected.write(json.dumps(entry) + "\n")

        images = read_annotations(source, on_error=reject)
        while chunk := list(islice(images, _ROWS_PER_BATCH)):
            writer.write_batch(records_to_batch(image.to_record() for image in chunk))
            hashes.extend(_hash(image.image_id) for image in chunk)
            region_counts.extend(len(image.regions) for image in chunk)
    hash_of_row = np.array(hashes, dtype=np.uint64)
    rows = np.argsort(hash_of_row, kind="stable")
    np.save(folder / _HASHES, hash_of_row[rows])
    np.save(folder / _ROWS, rows.astype(np.int64))
    np.save(folder / _COUNTS, np.array(region_counts, dtype=np.int32))
    return len(hashes)


def image_id_of(record: Any) -> str | None:
    """Return the path of a training record's (first) image: `image_id` in PAD, `image` in LLaVA's JSON."""
    image_id = record.get("image_id", record.get("image"))
    if isinstance(image_id, list | tuple):
        image_id = image_id[0] if image_id else None
    return image_id if isinstance(image_id, str) else None


def _hash(image_id: str) -> int:
    path = normal_path(image_id).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "little")


def _identity(path: Path) -> str:
    stat = path.stat()
    key = f"{_FORMAT}|{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return hashlib.blake2b(key.encode(), digest_size=10).hexdigest()


def _default_cache_dir() -> Path:
    if chosen := os.environ.get("PATCH_ALIGNED_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patch_aligned"
