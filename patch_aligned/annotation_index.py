"""Looks up annotated images by path, outside the Python heap: memory-mapped Arrow records and a sorted hash table.

A PAD file is validated and converted once, into a cache folder named after the file's identity. All processes map the
same pages, so 558K images cost a worker almost no memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from patch_aligned.files import written_whole
from patch_aligned.pad import AnnotatedImage, AnnotationError, image_of_record, normal_path, read_annotations
from patch_aligned.record_files import PAD_SCHEMA, RecordFileError, batch_to_records, iter_records, records_to_batch

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
        return image_of_record(batch_to_records(batch)[0])

    @property
    def regions(self) -> int:
        """Total number of regions."""
        return int(self._region_counts.sum(dtype=np.int64))

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
