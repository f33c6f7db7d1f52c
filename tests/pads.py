"""Masks and PAD records, made without the packages' own code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

TAGS = ("water", "traffic light", "dog", "red boat")


def rle_of(mask: Any) -> str:
    """A mask `[H, W]` as COCO's compressed RLE."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()


def rectangle(left: int, top: int, right: int, bottom: int, size_wh: tuple[int, int], tag: str) -> dict[str, Any]:
    """A region that fills a box of whole pixels."""
    mask = np.zeros(size_wh[::-1])
    mask[top:bottom, left:right] = 1
    return {"tag": tag, "bbox": [left, top, right, bottom], "rle_mask": rle_of(mask)}


def record_of_quarters(image: str, size_wh: tuple[int, int], tags: Sequence[str] = TAGS) -> dict[str, Any]:
    """A record whose regions are the quarters of the image: left above, right above, left below, right below."""
    width, height = size_wh
    labels = []
    for place, tag in enumerate(tags):
        left, top = width * (place % 2) // 2, height * (place // 2) // 2
        labels.append(rectangle(left, top, left + (width + 1) // 2, top + (height + 1) // 2, size_wh, tag))
    return {"image_id": image, "size": [width, height], "caption": "a lake", "labels": labels}
