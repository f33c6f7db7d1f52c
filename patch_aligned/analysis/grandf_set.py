"""GranD-f, the fine-tuning set of GLaMM: phrases of a caption with their masks; the phrases are the labels.

Its files have three shapes:

- human annotated and Open-PSG: `[{file_name, caption, groundings: {phrase: {token_positives, rle_masks}}}]`;
- RefCOCOg: `[{key: {img_file_name, caption, refs: [{sentence, segmentation}]}}]`, with polygons and without sizes,
  which are then read from the images;
- Flickr30k: tables as COCO's, where an annotation has `tokens_positive` (places in the image's caption) and `sam_mask`.

All of a phrase's masks together are its region. Phrases without a mask are left out and counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from patch_aligned.analysis.coco_masks import box_of, one_rle, required
from patch_aligned.analysis.coco_set import Record
from patch_aligned.dataset.image_files import stored_size_wh

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
        partial(_record, name, captions[name], phrases, sizes.get(name), path, image_folder)
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


def _record(
    name: str, caption: str, phrases: list[Phrase], size: tuple[int, int] | None, path: Path, image_folder: Path
) -> dict[str, Any]:
    if size is None:
        size = stored_size_wh(image_folder, name)
    labels = []
    for phrase, segmentation in phrases:
        rle_mask = one_rle(segmentation, size, f"{path}: {name}, phrase {phrase!r}")
        labels.append({"tag": phrase, "bbox": box_of(rle_mask, size), "rle_mask": rle_mask})
    return {"image_id": name, "size": list(size), "caption": caption, "labels": labels}
