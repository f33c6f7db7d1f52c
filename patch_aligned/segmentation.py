"""Encode COCO's segmentations, polygons and run lengths of any origin, as compressed RLE strings.

pycocotools checks nothing that it is given: of a far coordinate it takes memory without bound, run lengths with a wrong
total let it loop for ever or write beyond its memory. So whatever a file holds is checked here first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pycocotools import mask as coco_mask

from patch_aligned.masks import rle_problems
from patch_aligned.record_files import is_finite_number, quoted

_POINTLESS = (0, 2, 4)
"""Numbers of a polygon that encloses nothing: none, one corner or two, as exports of boxes and points have them."""


def has_mask(segmentation: Any) -> bool:
    """Whether a segmentation has any part that may enclose something."""
    return bool(segmentation) and bool(_parts(segmentation))


def union_rle(segmentation: Any, size_wh: tuple[int, int], place: str) -> str:
    """Encode the union of a segmentation's parts as a COCO compressed RLE string of the image's size.

    Args:
        segmentation: a list of polygons `[x1, y1, x2, y2, ...]`, an RLE `{"size": [height, width], "counts": ...}` with
            counts as a list or as text, or a list of such RLEs. Polygons of fewer than three corners are left out.
        size_wh: width and height of the image, pixels.
        place: file, record and field, for messages.

    Raises:
        ValueError: a part is none of these, belongs to an image of another size, or lies far outside the image.
    """
    parts = _parts(segmentation)
    if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
        raise ValueError(f"{place}: found {quoted(segmentation)}, expected polygons or an RLE; correct the record.")
    encoded = []
    for part in parts:
        try:
            encoded.append(_encoded(part, *size_wh))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{place}: found {quoted(part)} ({error}), expected a polygon [x1, y1, x2, y2, x3, y3, ...] or an "
                "RLE; correct the record."
            ) from error
    rle_mask = encoded[0]["counts"] if len(encoded) == 1 else coco_mask.merge(encoded)["counts"]
    return rle_mask.decode("ascii") if isinstance(rle_mask, bytes) else rle_mask


def _parts(segmentation: Any) -> Any:
    if not isinstance(segmentation, list):
        return [segmentation] if isinstance(segmentation, Mapping) else segmentation
    return [part for part in segmentation if not (isinstance(part, list) and len(part) in _POINTLESS)]


def _encoded(part: Any, width: int, height: int) -> Any:
    """Encode one part of a segmentation as pycocotools' RLE."""
    if not isinstance(part, Mapping):
        if not isinstance(part, Sequence) or isinstance(part, str) or len(part) % 2 or len(part) < 6:
            raise ValueError("a polygon has at least three corners, each of two numbers")
        reach = max(width, height)  # pycocotools draws each edge pixel by pixel, also outside the image
        if not all(is_finite_number(number) and -reach <= number <= 2 * reach for number in part):
            raise ValueError(f"a corner that is no finite number, or far outside the image of {width} x {height}")
        return coco_mask.frPyObjects([[float(number) for number in part]], height, width)[0]
    if list(part.get("size", ())) != [height, width]:
        raise ValueError(
            f"a mask of size {part.get('size')}, where the image is [height, width] = {[height, width]}: these "
            "annotations belong to other images"
        )
    counts = part.get("counts")
    if isinstance(counts, list | tuple):
        if not all(is_finite_number(run) and run >= 0 and run == int(run) for run in counts):
            raise ValueError("a run that is no number of pixels")
        if sum(counts) != width * height:
            raise ValueError(f"runs that sum to {sum(counts)} pixels, not to {width} x {height} = {width * height}")
        return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    problem = rle_problems([text], [width * height])[0] if isinstance(text, str) else "no counts"
    if problem:
        raise ValueError(problem)
    return {"size": [height, width], "counts": text}
