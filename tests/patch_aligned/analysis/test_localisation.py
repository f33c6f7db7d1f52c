"""Localising one label in one image: the same maps as in an analysis, and any text without a mask."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import patch_aligned
from llava.convert.to_hf import to_hf
from patch_aligned.analysis import AnalysisSettings, MeasureSettings, analyse, load_models, localise
from patch_aligned.analysis.localisation import PictureCell, map_difference, panel_jpegs, save_localisation_figure
from patch_aligned.cells import Layout, TokenGrid, grid_over_box
from patch_aligned.models.base import VisionLanguageModel
from tests.folders import set_config
from tests.patch_aligned.analysis.conftest import rectangle


@pytest.fixture
def models(golden_world: Path) -> list[VisionLanguageModel]:
    return load_models(["random=random:1", "start=train_init/mm_projector.bin"], "tiny-vicuna", "tiny-clip")


def test_a_region_gives_the_maps_of_the_analysis(models: list[VisionLanguageModel], pad: Path):
    settings = MeasureSettings(pad, pad.parent / "pictures", picture_rows=3)
    for row in analyse(models, AnalysisSettings(settings)).picture:
        record = next(r for r in map(json.loads, pad.read_text().splitlines()) if r["image_id"] == row.image_id)
        regions = [region for region in record["labels"] if region["tag"] == row.label]
        masks = [coco_mask.decode({"size": [56, 80], "counts": r["rle_mask"].encode()}) for r in regions]
        largest = max(masks, key=np.sum)
        found = localise(models, pad.parent / "pictures" / row.image_id, row.label, largest)
        assert list(found.cells) == ["random", "start"]
        np.testing.assert_array_equal(found.truth, row.truth)
        for name, cell in row.cells.items():
            torch.testing.assert_close(found.cells[name].cosine, cell.cosine, rtol=1e-5, atol=1e-6)
            assert torch.equal(found.cells[name].predicted, cell.predicted)
            assert found.cells[name].iou_px == pytest.approx(cell.iou_px, rel=1e-9)
        of_255 = localise(models, pad.parent / "pictures" / row.image_id, row.label, 255 * largest.astype(np.uint8))
        assert of_255.cells["start"].iou_px == found.cells["start"].iou_px


def test_towers_that_cut_images_differently_show_the_same_region_each_under_its_own_cells(
    write_pad: Callable, tmp_path: Path
):
    set_config("tiny-llava", image_aspect_ratio="pad")
    to_hf("tiny-llava", tmp_path / "hf", dtype="float32")
    models = load_models(["own=tiny-llava", f"hf={tmp_path / 'hf'}"], image_aspect_ratio="square")
    regions = {"tree": rectangle(0, 0, 20, 56, "tree"), "dog": rectangle(40, 28, 68, 56, "dog")}
    pad = write_pad(list(regions.values()))  # the crop leaves less of the larger one than of the other
    (row,) = analyse(models, AnalysisSettings(MeasureSettings(pad, pad.parent / "pictures"))).picture
    assert row.label == "tree"
    mask = coco_mask.decode({"size": [56, 80], "counts": regions["tree"]["rle_mask"].encode()})
    found = localise(models, pad.parent / "pictures" / "0.png", "tree", mask)
    assert list(row.cells) == list(found.cells) == ["own", "hf"]
    for name, cell in row.cells.items():
        assert cell.iou_px == pytest.approx(found.cells[name].iou_px, rel=1e-9)
        assert cell.grid.box_xyxy_px == found.cells[name].grid.box_xyxy_px
    assert row.truth.sum() == 20 * 56
    assert row.cells["own"].grid.box_xyxy_px == (12, 0, 68, 56)  # cropped
    assert row.cells["hf"].grid.box_xyxy_px == (0, -12, 80, 68)  # padded


def test_any_text_can_be_sought_without_a_mask(models: list[VisionLanguageModel], pad: Path, tmp_path: Path):
    found = localise(models, pad.parent / "pictures" / "0.png", "a red car at night")
    assert math.isnan(found.cells["start"].iou_px)
    assert found.cells["start"].predicted.any()
    save_localisation_figure([found], tmp_path / "figure.png", "mid_range")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width > 1000
    assert {key[:1] for key in panel_jpegs(found) if key != "truth"} == {("random",), ("start",)}


def test_paths_of_models_give_the_maps_of_loaded_ones_and_the_figure_is_saved(
    models: list[VisionLanguageModel], pad: Path, tmp_path: Path
):
    image = pad.parent / "pictures" / "0.png"
    start = Path("start")  # beside the projector, the config that names its tower
    shutil.copytree("train_init", start)
    (start / "config.json").write_text(json.dumps({"mm_vision_tower": "tiny-clip", "mm_projector_type": "mlp2x_gelu"}))
    places = ["start=start", "random=random:1"]
    found = patch_aligned.localise(places, image, "dog", base="tiny-vicuna", save=tmp_path / "dog.png")
    expected = localise(models, image, "dog")
    assert list(found.cells) == ["start", "random"]
    for name, cell in expected.cells.items():
        assert torch.equal(found.cells[name].cosine, cell.cosine)
    with Image.open(tmp_path / "dog.png") as picture:
        assert picture.width > 1000
    with pytest.raises(ValueError, match="--base is missing"):
        patch_aligned.localise(places, image, "dog")


def test_what_cannot_be_sought_says_why(models: list[VisionLanguageModel], pad: Path):
    image = pad.parent / "pictures" / "0.png"
    with pytest.raises(ValueError, match=r"the mask is \[80, 56\]; expected the image's \[56, 80\]"):
        localise(models, image, "dog", np.ones((80, 56)))
    with pytest.raises(ValueError, match="'top_area' is told the region's size: pass a mask"):
        localise(models, image, "dog", threshold_rule="top_area")


def test_maps_of_other_cells_are_subtracted_where_both_models_look():
    grids = grid_over_box((60, 40), (0, 0, 60, 40), (2, 3)), grid_over_box((60, 40), (10, -10, 50, 50), (3, 4))
    maps = [torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed)) for seed, grid in enumerate(grids)]
    cells = [PictureCell(grid, values, values > 0, math.nan) for grid, values in zip(grids, maps, strict=True)]
    grid, values = map_difference(*cells)
    assert grid.x_edges == (10, 20, 30, 40, 50) and grid.y_edges == (0, 10, 20, 30, 40)

    def painted(grid: TokenGrid, values: torch.Tensor) -> np.ndarray:
        return Layout((grid,), values.numel()).heat_map(values.ravel())

    expected = painted(grids[0], maps[0]) - painted(grids[1], maps[1])
    np.testing.assert_allclose(painted(grid, values)[:, 10:50], expected[:, 10:50], atol=1e-7)
    assert map_difference(cells[0], cells[0])[1].abs().max() == 0
