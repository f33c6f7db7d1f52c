"""Look-up of annotated images by path, off the Python heap: memory-mapped Arrow records and a sorted table of hashes.

The source file is converted once, checked record by record on the way, and kept in a cache folder named after the
file's identity. Every process maps the same pages, so 558K images cost a worker next to nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from patch_aligned.annotations import AnnotatedImage, AnnotationError, Region, normal_path, read_annotations
from patch_aligned.record_files import PAD_SCHEMA, RecordFileError, batch_to_records, iter_records, records_to_batch

logger = logging.getLogger(__name__)

_FORMAT = "4"  # part of the cache key; raise it when the layout of the folder or a check changes
ROWS_PER_BATCH = 256
"""Rows that stand together on disk; files beside the index keep to the same batches."""
_RECORDS, _REJECTED = "records.arrow", "rejected.jsonl"
_HASHES, _ROWS, _COUNTS = "hashes.npy", "rows.npy", "region_counts.npy"
_REJECTED_SHOWN = 5


class AnnotationIndex:
    """Annotated images of one file, found by `image_id`. Read-only, picklable, cheap to fork.

    Attributes:
        source: the file that was converted.
        folder: the conversion.
        rejected: number of records that broke the format and were left out; listed in `folder / "rejected.jsonl"`.
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
        batch = self._reader.get_batch(row // ROWS_PER_BATCH).slice(row % ROWS_PER_BATCH, 1)
        return _image_of(batch_to_records(batch)[0])

    @property
    def batches(self) -> int:
        """Number of batches of `ROWS_PER_BATCH` rows; the last may be shorter."""
        return int(self._reader.num_record_batches)

    def read_batch(self, number: int) -> list[AnnotatedImage]:
        """The images of one batch, in the order of their rows."""
        return [_image_of(record) for record in batch_to_records(self._reader.get_batch(number))]

    @property
    def regions(self) -> int:
        """Number of regions of all images."""
        return int(self._region_counts.sum(dtype=np.int64))

    def find(self, image_id: str) -> int | None:
        """Row of an image, or None if the file has no record of it; `./a.jpg` finds `a.jpg`."""
        wanted = np.uint64(_hash(image_id))  # of the table's type, or searchsorted converts the whole table
        position = int(np.searchsorted(self._hashes, wanted))
        while position < len(self) and self._hashes[position] == wanted:
            row = int(self._rows[position])
            batch = self._reader.get_batch(row // ROWS_PER_BATCH)
            if normal_path(batch.column("image_id")[row % ROWS_PER_BATCH].as_py()) == normal_path(image_id):
                return row
            position += 1
        return None

    def count_images_with_regions(self, image_ids: Iterable[str]) -> tuple[int, int]:
        """How many images are asked for, and how many of them have at least one region."""
        ids = iter(image_ids)
        asked = with_regions = 0
        while chunk := list(islice(ids, 1 << 16)):
            wanted = np.array([_hash(image_id) for image_id in chunk], dtype=np.uint64)
            position = np.minimum(np.searchsorted(self._hashes, wanted), len(self) - 1)
            found = self._hashes[position] == wanted if len(self) else np.zeros(len(wanted), dtype=bool)
            with_regions += int((self._region_counts[self._rows[position[found]]] > 0).sum())
            asked += len(chunk)
        return asked, with_regions

    def coverage_of(self, training_file: Path) -> tuple[int, int]:
        """Images of a training file (PAD or LLaVA's JSON), and how many have a region here; remembered on disk."""
        known = self.folder / f"coverage-{_identity(training_file)}.json"
        if known.is_file():
            asked, with_regions = json.loads(known.read_text())
            return int(asked), int(with_regions)
        counts = self.count_images_with_regions(_image_ids_of(training_file))
        temporary = known.with_name(f".{known.name}.{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(counts))
        temporary.replace(known)
        return counts

    def rejection_message(self) -> str:
        """How many records were left out, where they are listed, and what is wrong with the first."""
        first = "\n  ".join(self.rejections())
        return f"{self.source}: {self.rejected} broken records, all listed in {self.folder / _REJECTED}:\n  {first}"

    def rejections(self, limit: int = _REJECTED_SHOWN) -> list[str]:
        """Messages of the first rejected records."""
        with (self.folder / _REJECTED).open(encoding="utf-8") as file:
            return [json.loads(line)["error"] for line in islice(file, limit)]


def open_annotation_index(source: str | Path, cache_dir: str | Path | None = None) -> AnnotationIndex:
    """Opens the index of a PAD file, converting the file first if it is new or has changed.

    Several processes may call this at once: one converts, the others wait for it. Broken records are left out of the
    index and listed in it (`rejected`, `rejections`); what to do about them is the caller's decision.

    Args:
        source: JSON, JSON lines (also gzipped) or Parquet.
        cache_dir: where conversions are kept; None means `$PATCH_ALIGNED_CACHE`, else `~/.cache/patch_aligned`.

    Raises:
        RecordFileError: if the file is missing or broken as a whole.
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
    """Writes the conversion beside `folder` and renames it, so that a folder of this name is always whole."""
    logger.info("Converting %s, once, to %s", source, folder)
    started = time.monotonic()
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        with (temporary / _REJECTED).open("w", encoding="utf-8") as rejected:
            images = _write_conversion(source, temporary, rejected)
        if folder.name != f"{source.name}-{_identity(source)}":
            raise RecordFileError(f"{source}: changed while it was read; start again when it is written completely")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # not the other converter that a file lock on a network drive let through
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("Converted %d records of %s in %.0f s", images, source, time.monotonic() - started)


def _write_conversion(source: Path, folder: Path, rejected: IO[str]) -> int:
    hashes: list[int] = []
    region_counts: list[int] = []

    def reject(error: AnnotationError) -> None:
        entry = {"record": error.record_index, "image_id": error.image_id, "error": str(error)}
        rejected.write(json.dumps(entry) + "\n")

    images = read_annotations(source, on_error=reject)
    with pa.OSFile(str(folder / _RECORDS), "wb") as file, pa.ipc.new_file(file, PAD_SCHEMA) as writer:
        while chunk := list(islice(images, ROWS_PER_BATCH)):
            writer.write_batch(records_to_batch(image.to_record() for image in chunk))
            hashes.extend(_hash(image.image_id) for image in chunk)
            region_counts.extend(len(image.regions) for image in chunk)
    hash_of_row = np.array(hashes, dtype=np.uint64)
    rows = np.argsort(hash_of_row, kind="stable")
    np.save(folder / _HASHES, hash_of_row[rows])
    np.save(folder / _ROWS, rows.astype(np.int64))
    np.save(folder / _COUNTS, np.array(region_counts, dtype=np.int32))
    return len(hashes)


def _image_ids_of(training_file: Path) -> Iterator[str]:
    for record in iter_records(training_file):
        if isinstance(record, dict) and (image_id := image_id_of(record)) is not None:
            yield image_id


def image_id_of(record: Any) -> str | None:
    """Path by which a training record names its (first) image: `image_id` in PAD, `image` in LLaVA's JSON."""
    image_id = record.get("image_id", record.get("image"))
    if isinstance(image_id, list | tuple):
        image_id = image_id[0] if image_id else None
    return image_id if isinstance(image_id, str) else None


def _image_of(record: dict[str, Any]) -> AnnotatedImage:
    """A record that was checked when it was converted."""
    record, labels = dict(record), record["labels"]
    regions = tuple(
        Region(label.pop("tag"), tuple(label.pop("bbox")), label.pop("rle_mask"), label) for label in labels
    )
    del record["labels"]
    width, height = record.pop("size")
    return AnnotatedImage(record.pop("image_id"), (width, height), record.pop("caption"), regions, record)


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
