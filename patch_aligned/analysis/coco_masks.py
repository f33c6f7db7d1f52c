"""Masks as COCO's tools write them (polygons, run lengths as a list or as text) -> one compressed RLE string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pycocotools import mask as coco_mask

from patch_aligned.rle import rle_problems


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
