"""Sets of annotated images in the formats that measures are taken on, behind one interface.

- `pad`: what this package writes and trains on (`patch_aligned.pad`).
- `coco`: COCO's instances (`coco_set`).
- `grandf`: GranD-f, phrases of a caption with their masks (`grandf_set`).

A set yields its images as `AnnotatedImage`, whatever its format, again each time it is iterated; every mask passes the
same checks. What a set holds but does not yield, such as COCO's crowds, is counted by its reason.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from patch_aligned.images import stored_size_wh
from patch_aligned.masks import rle_problems
from patch_aligned.pad import AnnotatedImage, RecordFileError, iter_records, parse_annotation, read_annotations

# Masks as COCO's tools write them (polygons, run lengths as a list or as text) -> one compressed RLE string.


def one_rle(segmentation: Any, size_wh: tuple[int, int], place: str) -> str:
    """The union of a segmentation's parts as COCO's compressed RLE string of the image's size.

    Args:
        segmentation: a list of polygons `[x1, y1, x2, y2, ...]`, an RLE `{"size": [height, width], "counts": ...}` with
            counts as a list or as text, or a list of such RLEs.
        size_wh: width and height of the image, pixels.
        place: file, record and field, for messages.

    Raises:
        ValueError: it is none of these, or an RLE is of another size.
    """
    width, height = size_wh
    parts = [segmentation] if isinstance(segmentation, Mapping) else segmentation
    if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
        raise ValueError(f"{place}: found {_short(segmentation)}, expected polygons or an RLE; correct the record.")
    encoded: list[Any] = []
    for part in parts:
        if isinstance(part, Mapping):
            if list(part.get("size", ())) != [height, width]:
                raise ValueError(
                    f"{place}: found a mask of size {part.get('size')}, expected [height, width] = {[height, width]} "
                    "as the image has it; these annotations belong to other images."
                )
            counts = part.get("counts")
        else:
            counts = part
        try:
            if isinstance(part, Mapping) and isinstance(counts, str | bytes):
                text = counts if isinstance(counts, str) else counts.decode("ascii")
                # Before pycocotools reads it: a broken string makes it write beyond its memory.
                if problem := rle_problems([text], [width * height])[0]:
                    raise ValueError(problem)
                encoded.append({"size": [height, width], "counts": text})
            elif isinstance(part, Mapping):
                encoded.append(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))
            elif isinstance(part, Sequence) and len(part) >= 6 and len(part) % 2 == 0:
                encoded += coco_mask.frPyObjects([[float(number) for number in part]], height, width)
            else:
                raise TypeError("a polygon has at least three corners, each of two numbers")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{place}: found {_short(part)} ({error}), expected a polygon [x1, y1, x2, y2, x3, y3, ...] or an RLE; "
                "correct the record."
            ) from error
    merged = encoded[0] if len(encoded) == 1 else coco_mask.merge(encoded)
    rle_mask = merged["counts"]
    return rle_mask.decode("ascii") if isinstance(rle_mask, bytes) else rle_mask


def required(record: Mapping[str, Any], key: str, place: str) -> Any:
    """A field that a record must have.

    Raises:
        ValueError: it has none; `place` names file and record.
    """
    if record.get(key) is None:
        raise ValueError(f"{place}, field '{key}': found none, expected one as in COCO's files; correct the record.")
    return record[key]


def box_of(rle_mask: str, size_wh: tuple[int, int]) -> list[float]:
    """The mask's bounding box, `[x1, y1, x2, y2]` in pixels; all 0 for an empty mask."""
    x, y, width, height = coco_mask.toBbox({"size": list(size_wh[::-1]), "counts": rle_mask.encode()}).tolist()
    return [x, y, x + width, y + height]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


# COCO's instances (`instances_val2017.json`): category names are the labels.
#
# Crowds (`iscrowd`) outline a group under the name of one of its members, often loosely: they are left out and counted,
# as in COCO's own scores.

Record = Callable[[], dict[str, Any]]
"""Makes a PAD record when it is called: masks are encoded only when their image's turn has come."""

TABLES = ("images", "annotations", "categories")


def read_coco(document: Any, path: Path) -> tuple[list[Record], dict[str, int]]:
    """The images of a file of instances, in order, as PAD records; and how many annotations were left out, by reason.

    Args:
        document: what the file holds.
        path: the file, for messages.

    Raises:
        ValueError: a table or a field is missing, or an annotation names an image or a category that there is not.
    """
    tables = _tables(document, path, TABLES)
    categories = {required(category, "id", f"{path}: a category"): category for category in tables["categories"]}
    names = {key: required(category, "name", f"{path}: category {key}") for key, category in categories.items()}
    images = {required(image, "id", f"{path}: an image"): image for image in tables["images"]}
    of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    for annotation in tables["annotations"]:
        for key, known in (("image_id", images), ("category_id", names)):
            if annotation.get(key) not in known:
                raise ValueError(
                    f"{path}: annotation {annotation.get('id')}, field '{key}': found {annotation.get(key)!r}, "
                    f"expected one of the {len(known)} ids that the file lists. Is this a file of instances?"
                )
        if annotation.get("iscrowd"):
            skipped["crowd"] += 1
        elif not annotation.get("segmentation"):
            skipped["no mask"] += 1
        else:
            of_image[annotation["image_id"]].append(annotation)
    return [partial(_coco_record, image, of_image[key], names, path) for key, image in images.items()], dict(skipped)


def _coco_record(
    image: Mapping[str, Any], annotations: list[dict[str, Any]], names: Mapping[Any, str], path: Path
) -> dict[str, Any]:
    file_name, width, height = (
        required(image, key, f"{path}: image {image['id']}") for key in ("file_name", "width", "height")
    )
    size = (width, height)
    labels = []
    for annotation in annotations:
        place = f"{path}: annotation {annotation.get('id')} of {file_name}, field 'segmentation'"
        rle_mask = one_rle(annotation["segmentation"], size, place)
        labels.append({"tag": names[annotation["category_id"]], "bbox": box_of(rle_mask, size), "rle_mask": rle_mask})
    return {"image_id": file_name, "size": list(size), "caption": "", "labels": labels}


def _tables(document: Any, path: Path, expected: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    if not isinstance(document, Mapping) or not all(isinstance(document.get(name), list) for name in expected):
        found = ", ".join(map(str, document)) if isinstance(document, Mapping) else f"a {type(document).__name__}"
        raise ValueError(
            f"{path}: found {found[:80] or 'nothing'}; expected a file of COCO instances with the lists "
            f"{', '.join(expected)}, such as instances_val2017.json."
        )
    return {name: document[name] for name in expected}


# GranD-f, the fine-tuning set of GLaMM: phrases of a caption with their masks; the phrases are the labels.
#
# Its files have three shapes:
#
# - human annotated and Open-PSG: `[{file_name, caption, groundings: {phrase: {token_positives, rle_masks}}}]`; -
# RefCOCOg: `[{key: {img_file_name, caption, refs: [{sentence, segmentation}]}}]`, with polygons and without sizes,
# which are then read from the images; - Flickr30k: tables as COCO's, where an annotation has `tokens_positive`
# (places in the image's caption) and `sam_mask`.
#
# All of a phrase's masks together are its region. Phrases without a mask are left out and counted.

Phrase = tuple[str, Any]
"""A phrase with its segmentation, as `one_rle` takes it."""


def is_grandf(document: Any) -> bool:
    """Whether this is what a file of GranD-f holds, judged by its first record."""
    if isinstance(document, Mapping):
        annotations = document.get("annotations")
        return isinstance(annotations, list) and bool(annotations) and "sam_mask" in annotations[0]
    first = document[0] if isinstance(document, list) and document else None
    return isinstance(first, Mapping) and (isinstance(first.get("groundings"), Mapping) or _referred(first) is not None)


def read_grandf(document: Any, path: Path, image_folder: Path) -> tuple[list[Record], dict[str, int]]:
    """The images of a file in order, as PAD records; and how many phrases were left out, by reason.

    Args:
        document: what the file holds.
        path: the file, for messages.
        image_folder: folder of the images, for RefCOCOg's sizes.

    Raises:
        ValueError: the file has none of the three shapes, or a record lacks a field.
    """
    if not is_grandf(document):
        raise ValueError(
            f"{path}: found no file of GranD-f; expected records with 'groundings' or 'refs', or tables whose "
            "annotations have a 'sam_mask'. Name another format."
        )
    if isinstance(document, Mapping):
        items = _from_tables(document, path)
    else:
        items = [_from_record(record, f"{path}: record {index}") for index, record in enumerate(document)]
    skipped: Counter[str] = Counter()
    phrases_of: dict[str, list[Phrase]] = {}  # several captions of one image become one record
    captions: dict[str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, caption, phrases, size in items:
        kept = [(text, mask) for text, mask in phrases if text.strip() and mask]
        skipped["no phrase or no mask"] += len(phrases) - len(kept)
        phrases_of.setdefault(name, []).extend(kept)
        captions.setdefault(name, caption)
        if size is not None:
            sizes[name] = size
    records: list[Record] = [
        partial(_grandf_record, name, captions[name], phrases, sizes.get(name), path, image_folder)
        for name, phrases in phrases_of.items()
    ]
    return records, dict(+skipped)


Item = tuple[str, str, list[Phrase], "tuple[int, int] | None"]
"""File name, caption, phrases, width and height."""


def _from_record(record: Any, place: str) -> Item:
    referred = _referred(record) if isinstance(record, Mapping) else None
    if referred is not None:
        phrases = [(str(ref.get("sentence", "")), ref.get("segmentation")) for ref in referred["refs"]]
        return str(referred.get("img_file_name", "")), str(referred.get("caption", "")), phrases, None
    if not isinstance(record, Mapping) or not isinstance(record.get("groundings"), Mapping):
        raise ValueError(f"{place}: found neither 'groundings' nor 'refs'; expected one of them. Correct the record.")
    grounded = [(str(phrase), value.get("rle_masks")) for phrase, value in record["groundings"].items()]
    first = next((masks[0] for _, masks in grounded if masks), None)
    size = None
    if first is not None:
        height, width = required(first, "size", f"{place}, rle_masks")
        size = (int(width), int(height))
    return str(record.get("file_name", "")), str(record.get("caption", "")), grounded, size


def _from_tables(document: Mapping[str, Any], path: Path) -> list[Item]:
    of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in document["annotations"]:
        if not annotation.get("ignore"):
            of_image[annotation.get("image_id")].append(annotation)
    items: list[Item] = []
    for image in document["images"]:
        caption = image.get("caption", "")
        phrases = []
        number, name, width, height = (
            required(image, key, f"{path}: image {image.get('id')}") for key in ("id", "file_name", "width", "height")
        )
        for annotation in of_image[number]:
            spans = annotation.get("tokens_positive") or [[0, 0]]
            phrases.append((caption[spans[0][0] : spans[0][1]], annotation.get("sam_mask")))
        items.append((name, caption, phrases, (int(width), int(height))))
    return items


def _referred(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The inner record of RefCOCOg's shape, or None."""
    inner = next(iter(record.values()), None) if len(record) == 1 else None
    return inner if isinstance(inner, Mapping) and isinstance(inner.get("refs"), list) else None


def _grandf_record(
    name: str, caption: str, phrases: list[Phrase], size: tuple[int, int] | None, path: Path, image_folder: Path
) -> dict[str, Any]:
    if size is None:
        size = stored_size_wh(image_folder, name)
    labels = []
    for phrase, segmentation in phrases:
        rle_mask = one_rle(segmentation, size, f"{path}: {name}, phrase {phrase!r}")
        labels.append({"tag": phrase, "bbox": box_of(rle_mask, size), "rle_mask": rle_mask})
    return {"image_id": name, "size": list(size), "caption": caption, "labels": labels}


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
