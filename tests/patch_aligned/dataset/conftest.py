"""PAD files of rectangles, and their images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.pads import rectangle

Label = dict[str, Any]
Record = dict[str, Any]
WIDTH, HEIGHT = 96, 64


def label(left: int, top: int, right: int, bottom: int, tag: str = "box", **changed: Any) -> Label:
    """A region whose mask fills the box, whole pixels of an image of 96 x 64."""
    return rectangle(left, top, right, bottom, (WIDTH, HEIGHT), tag) | changed


def record(name: str, *labels: Label, **changed: Any) -> Record:
    """A record of an image of 96 x 64."""
    return {"image_id": name, "size": [WIDTH, HEIGHT], "caption": "two words", "labels": list(labels)} | changed


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
