"""The picture of the first batch: masks and tokens where they belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patch_aligned.cells import square_grid
from patch_aligned.masks import covered_tokens_of_regions
from patch_aligned.train import picture
from patch_aligned.train.picture import PicturedImage, PicturedRegion, save_picture
from tests.pads import rle_of

SIDE, GRID = 42, (3, 3)


def quarter_masked(treatment: str, label: str = "sea") -> PicturedImage:
    """A grey 84 x 42 image with a mask over its left quarter, 21 pixels wide."""
    grid = square_grid((84, 42), treatment, GRID, SIDE)
    mask = np.zeros((42, 84), dtype=np.uint8)
    mask[:, :21] = 1
    rle_mask = rle_of(mask)
    tokens = covered_tokens_of_regions([rle_mask], (84, 42), grid)[0]
    original, seen = Image.new("RGB", (84, 42), (128, 128, 128)), torch.full((3, SIDE, SIDE), 0.5)
    return PicturedImage(original, seen, "a.jpg", [PicturedRegion(label, rle_mask, tokens if tokens.any() else None)])


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


def test_masks_lie_on_the_image_and_tokens_on_what_the_tower_sees(tmp_path: Path):
    """The panel is square and the image half as high as wide; the mask covers its left quarter."""
    masks, tokens = coloured(save_picture([quarter_masked("pad")], GRID, tmp_path / "first"))
    rows, cols = np.nonzero(masks)
    panel = picture._PANEL
    found = [rows.min(), rows.max() + 1, cols.min(), cols.max() + 1]
    np.testing.assert_allclose(found, [panel / 4, 3 * panel / 4, 0, panel / 4], atol=2)
    # The mask covers 3/4 of the middle left cell, and a quarter of it in height above and below: 3/16.
    rows, cols = np.nonzero(tokens)
    np.testing.assert_allclose(
        [rows.min(), rows.max() + 1, cols.min(), cols.max() + 1], [panel / 3, 2 * panel / 3, 0, panel / 3], atol=2
    )


def test_a_region_outside_the_crop_covers_no_token(tmp_path: Path):
    masks, tokens = coloured(save_picture([quarter_masked("crop")], GRID, tmp_path / "first"))
    assert masks.any() and not tokens.any()


def test_an_image_file_that_cannot_be_had_leaves_its_panel_empty(tmp_path: Path):
    image = quarter_masked("pad")
    without = PicturedImage(None, image.model_image, image.title, image.regions)
    masks, tokens = coloured(save_picture([without], GRID, tmp_path / "first"))
    assert tokens.any() and not masks.any()


@pytest.mark.parametrize("count", [1, 3, 20])
def test_large_batches_and_long_labels_fit(tmp_path: Path, count: int):
    images = [quarter_masked("pad", "a very " * 50 + "long label")] * count
    with Image.open(save_picture(images, GRID, tmp_path / "new" / "first.batch")) as drawn:
        assert drawn.filename == str(tmp_path / "new" / "first.batch.png")
        columns = 1 if count == 1 else 2
        assert drawn.width == columns * (2 * picture._PANEL + 3 * picture._GAP) + picture._GAP


def test_a_batch_without_images_gives_an_empty_sheet(tmp_path: Path):
    assert save_picture([], GRID, tmp_path / "first").is_file()
