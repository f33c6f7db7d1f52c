"""A small annotated world on the tiny recorded checkpoints: tower 56 px with 4 x 4 tokens, LLM of width 64."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import pads

SIZE_WH = (80, 56)
"""Wider than high: the tower's centre crop keeps columns 12 to 67 and no resizing happens."""


def rectangle(left: int, top: int, right: int, bottom: int, tag: str) -> dict[str, Any]:
    """The label of a rectangular region, in pixels of an image of `SIZE_WH`."""
    return pads.rectangle(left, top, right, bottom, SIZE_WH, tag)


REGIONS = (
    [rectangle(12, 0, 40, 28, "dog"), rectangle(40, 28, 68, 56, "red car")],
    [],
    [
        rectangle(0, 0, 12, 56, "tree"),
        rectangle(26, 14, 29, 17, "cup"),
        rectangle(20, 10, 60, 50, "dog") | {"kind": "object"},
    ],
    [rectangle(12, 28, 68, 56, "table"), rectangle(12, 0, 68, 20, "lamp") | {"kind": "object"}],
)
"""Three images with regions and one without; one region lies outside the crop, one covers no token."""


def write_images(folder: Path, *regions_of_images: list[dict[str, Any]]) -> Path:
    """Writes `pictures` of noise, and a PAD file with the given regions, one list an image; gives the file."""
    (folder / "pictures").mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    records = []
    for index, regions in enumerate(regions_of_images):
        noise = generator.integers(0, 255, (SIZE_WH[1], SIZE_WH[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"{index}.png")
        records.append({"image_id": f"{index}.png", "size": list(SIZE_WH), "caption": "noise", "labels": regions})
    path = folder / "pad.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


@pytest.fixture
def write_pad(golden_world: Path) -> Callable[..., Path]:
    """Writes images and regions beside the tiny checkpoints."""
    return partial(write_images, golden_world)


@pytest.fixture
def pad(write_pad: Callable[..., Path]) -> Path:
    """The PAD file of `REGIONS`."""
    return write_pad(*REGIONS)
