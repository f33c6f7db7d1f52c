"""PAD files of rectangles, and their images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

Label = dict[str, Any]
Record = dict[str, Any]
WIDTH, HEIGHT = 96, 64


@pytest.fixture
def label() -> Callable[..., Label]:
    """Makes a region whose mask fills the box `left, top, right, bottom`, whole pixels of an image of 96 x 64."""

    def make(left: int, top: int, right: int, bottom: int, tag: str = "box", **changed: Any) -> Label:
        mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
        mask[top:bottom, left:right] = 1
        counts = coco_mask.encode(mask)["counts"].decode()
        return {"tag": tag, "bbox": [left, top, right, bottom], "rle_mask": counts} | changed

    return make


@pytest.fixture
def record() -> Callable[..., Record]:
    """Makes a record of an image of 96 x 64."""

    def make(name: str, *labels: Label, **changed: Any) -> Record:
        return {"image_id": name, "size": [WIDTH, HEIGHT], "caption": "two words", "labels": list(labels)} | changed

    return make


@pytest.fixture
def write_pad(tmp_path: Path) -> Callable[..., Path]:
    """Writes `pad.json`, and an image for each record in the folder `images`."""

    def write(*records: Record) -> Path:
        for number, of_image in enumerate(records):
            path = tmp_path / "images" / str(of_image["image_id"])
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
        pad = tmp_path / "pad.json"
        pad.write_text(json.dumps(list(records)))
        return pad

    return write
