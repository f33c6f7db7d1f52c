"""Sets of annotated images in the formats that measures are taken on, behind one interface.

- `pad`: what this package writes and trains on (`patch_aligned.annotations`).
- `coco`: COCO's instances (`coco_set`).
- `grandf`: GranD-f, phrases of a caption with their masks (`grandf_set`).

A set yields its images as `AnnotatedImage`, whatever its format, again each time it is iterated; every mask passes the
same checks. What a set holds but does not yield, such as COCO's crowds, is counted by its reason.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from patch_aligned.analysis.coco_set import read_coco
from patch_aligned.analysis.grandf_set import is_grandf, read_grandf
from patch_aligned.annotations import AnnotatedImage, parse_annotation, read_annotations
from patch_aligned.record_files import RecordFileError, iter_records

FORMATS = ("auto", "pad", "coco", "grandf")
_BEGINNING = 4096  # characters


@dataclass(frozen=True)
class AnnotatedSet:
    """Annotated images that can be gone through any number of times.

    Attributes:
        path: the file.
        format: one of `FORMATS`, not `auto`.
        images: starts a pass over the images.
        skipped: regions of the whole file that no pass yields, counted by their reason.
        broken: ids of images that no pass yields since they cannot be measured, each with the reason.
    """

    path: Path
    format: str
    images: Callable[[], Iterator[AnnotatedImage]]
    skipped: Mapping[str, int] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[AnnotatedImage]:
        return self.images()

    def first(self, limit: int) -> AnnotatedSet:
        """The first `limit` images of the file."""
        return replace(self, images=lambda: islice(self.images(), limit))

    def random_subset(self, limit: int, seed: int) -> AnnotatedSet:
        """`limit` of the images in the file's order, chosen at random.

        The choice hangs on the images' ids and the seed alone: the same images in another order or format give the same
        subset, on any machine.
        """

        def rank(image_id: str) -> bytes:
            return hashlib.sha256(f"{seed}:{image_id}".encode()).digest()

        chosen = frozenset(heapq.nsmallest(limit, (image.image_id for image in self), key=rank))
        return replace(self, images=lambda: (image for image in self.images() if image.image_id in chosen))

    def without(self, broken: Mapping[str, str]) -> AnnotatedSet:
        """All images but those, which are given by id with the reason."""
        left = replace(self, images=lambda: (image for image in self.images() if image.image_id not in broken))
        return replace(left, broken=broken)


def open_annotated_set(path: Path, image_folder: Path, format: str = "auto") -> AnnotatedSet:
    """Opens a set of any format. COCO and GranD-f files are read whole; PAD streams.

    Args:
        path: the file of annotations.
        image_folder: folder of the images; one kind of GranD-f file leaves their sizes to it.
        format: one of `FORMATS`; `auto` tells it by the first record.

    Raises:
        ValueError: the format is unknown or another than the file's, or a record breaks it.
        FileNotFoundError: there is no such file.
    """
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; annotations may be {', '.join(FORMATS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of annotations.")
    if format == "pad" or (format == "auto" and not _is_one_document(path)):
        return AnnotatedSet(path, "pad", lambda: read_annotations(path))
    document = _load_json(path)
    if format == "auto":
        format = "grandf" if is_grandf(document) else "coco"
    records, skipped = read_coco(document, path) if format == "coco" else read_grandf(document, path, image_folder)
    return AnnotatedSet(path, format, lambda: (parse_annotation(record(), path) for record in records), skipped)


def _is_one_document(path: Path) -> bool:
    """Whether a file is COCO's or GranD-f's, as far as its beginning tells."""
    if path.suffix != ".json":
        return False
    with path.open(encoding="utf-8") as file:
        if file.read(_BEGINNING).lstrip().startswith("{"):
            return True
    first = next(iter_records(path), None)
    return first is not None and is_grandf([first])


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise RecordFileError(f"{path}: found no JSON: {error}; expected annotations. Fetch the file anew.") from error
