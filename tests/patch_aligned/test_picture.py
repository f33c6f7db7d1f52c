"""The picture of the first batch: masks and tokens where they belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from llava.image_geometry import ImageGeometry
from patch_aligned.train import picture
from patch_aligned.train.picture import PicturedImage, PicturedRegion, save_picture

SIDE, GRID = 42, (3, 3)


def quarter_masked(mode: str, label: str = "sea") -> PicturedImage:
    """A grey 84 x 42 image with a mask over its left quarter, 21 pixels wide."""
    geometry = ImageGeometry.of(mode, (84, 42), SIDE, GRID)
    mask = np.zeros((42, 84), dtype=np.uint8)
    mask[:, :21] = 1
    rle_mask = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    tokens = (geometry.token_coverage(mask) >= 0.5).flatten()
    return PicturedImage(torch.full((3, SIDE, SIDE), 0.5), geometry, "a.jpg", [PicturedRegion(label, rle_mask, tokens)])


def coloured(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where the two panels of the only image have colour rather than grey, each `[panel, panel]` bool."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    has_colour = pixels.max(axis=2) - pixels.min(axis=2) > 20
    top = 2 * picture._GAP + 2 * picture._LINE
    left = 2 * picture._GAP
    panels = []
    for start in (left, left + picture._PANEL + picture._GAP):
        panels.append(has_colour[top : top + picture._PANEL, start : start + picture._PANEL])
    return panels[0], panels[1]


def test_mask_and_tokens_are_drawn_where_the_padded_image_lies(tmp_path: Path):
    """The padded image fills the middle half in height; the mask covers its left quarter."""
    masks, tokens = coloured(save_picture([quarter_masked("pad")], tmp_path / "first"))
    rows, cols = np.nonzero(masks)
    panel = picture._PANEL
    found = [rows.min(), rows.max() + 1, cols.min(), cols.max() + 1]
    np.testing.assert_allclose(found, [panel / 4, 3 * panel / 4, 0, panel / 4], atol=2)
    # The mask covers 3/4 of the middle left cell, and a quarter of it in height above and below: 3/16.
    rows, cols = np.nonzero(tokens)
    np.testing.assert_allclose(
        [rows.min(), rows.max() + 1, cols.min(), cols.max() + 1], [panel / 3, 2 * panel / 3, 0, panel / 3], atol=2
    )


def test_a_region_outside_the_crop_is_not_drawn(tmp_path: Path):
    masks, tokens = coloured(save_picture([quarter_masked("square")], tmp_path / "first"))
    assert not masks.any() and not tokens.any()


@pytest.mark.parametrize("count", [1, 3, 20])
def test_large_batches_and_long_labels_fit(tmp_path: Path, count: int):
    images = [quarter_masked("pad", "a very " * 50 + "long label")] * count
    with Image.open(save_picture(images, tmp_path / "new" / "first.batch")) as drawn:
        assert drawn.filename == str(tmp_path / "new" / "first.batch.png")
        columns = 1 if count == 1 else 2
        assert drawn.width == columns * (2 * picture._PANEL + 3 * picture._GAP) + picture._GAP


def test_a_batch_without_images_gives_an_empty_sheet(tmp_path: Path):
    assert save_picture([], tmp_path / "first").is_file()
