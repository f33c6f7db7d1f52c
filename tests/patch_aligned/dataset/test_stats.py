"""Statistics against counts made by hand and by decoding every mask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from typer.testing import CliRunner

from patch_aligned.cli import app
from patch_aligned.dataset.stats import TokenSettings, as_json, as_markdown, gather_statistics
from tests.patch_aligned.dataset.conftest import label, record

Make = Callable[..., Any]
# 96 x 64 in stage 1: 64 x 64 from its middle, x from 16 to 80, over 4 x 4 tokens of 16 x 16 pixels.
TOKENS = TokenSettings(grid=4, side=64)


@pytest.fixture
def pad(write_pad: Make) -> Path:
    return write_pad(
        record("a.png", label(16, 0, 48, 32, "sky"), label(32, 16, 48, 24, "sky"), label(0, 0, 16, 64, "dog|cat")),
        record("b.png", caption=""),
        record("c.png", label(20, 20, 24, 24, "dot"), status="ok"),
    )


def test_counts_are_those_made_by_hand(pad: Path):
    numbers = as_json(gather_statistics(pad, TOKENS))
    assert (numbers["images"], numbers["images_without_regions"], numbers["images_with_caption"]) == (3, 1, 2)
    assert (numbers["regions"], numbers["unique_tags"], numbers["tags_seen_once"]) == (4, 3, 2)
    assert numbers["words_per_caption"] == 2
    assert numbers["tags"] == {"sky": 2, "dog|cat": 1, "dot": 1}
    assert numbers["regions_of_images"] == {"0": 1, "1": 1, "3": 1}
    assert numbers["statuses"] == {"ok": 1}
    assert numbers["sizes_wh"] == [{"size": [96, 64], "images": 3}]
    # The second region fills exactly half of its token, the third lies outside the crop, the fourth is small.
    tokens = numbers["tokens"]
    assert tokens["regions_without_token"] == 2
    assert tokens["share_of_regions_without_token"] == 0.5
    assert tokens["images_with_regions_but_none_covers_a_token"] == 1
    assert tokens["tokens_per_region"]["max"] == 4


def test_shares_of_area_are_those_of_the_decoded_masks(pad: Path):
    statistics = gather_statistics(pad, TOKENS)
    shares, together = [], []
    for of_image in json.loads(pad.read_text()):
        masks = [coco_mask.decode({"size": [64, 96], "counts": label["rle_mask"]}) for label in of_image["labels"]]
        shares += [mask.mean() for mask in masks]
        together += [np.max(masks, axis=0).mean()] if masks else []
    np.testing.assert_allclose(statistics.area_shares, shares, rtol=1e-6)
    np.testing.assert_allclose(statistics.coverage_shares, together, rtol=1e-6)


def test_a_padded_image_has_tokens_where_the_crop_has_none(pad: Path):
    tokens = TokenSettings(grid=4, side=64, image_aspect_ratio="pad", min_coverage=0.25)
    # One pixel of the model is 1.5 of the image, and a token is 24 x 24 pixels: x from 0, y from -16 to 80.
    assert list(gather_statistics(pad, tokens).covered_tokens) == [3, 0, 2, 0]


def test_statuses_of_skipped_images_count_too(pad: Path):
    skipped = [{"image_id": "d.png", "status": "no_boxes", "reason": None}, {"image_id": "e", "status": "unreadable"}]
    Path(f"{pad}.skipped.jsonl").write_text("\n".join(map(json.dumps, skipped)))
    assert as_json(gather_statistics(pad, TOKENS))["statuses"] == {"ok": 1, "no_boxes": 1, "unreadable": 1}


def test_a_file_without_regions_has_statistics(write_pad: Make):
    numbers = as_json(gather_statistics(write_pad(record("a.png")), TOKENS))
    assert numbers["regions"] == 0 and numbers["tokens"]["tokens_per_region"] == {}
    assert "| regions | 0 |" in as_markdown(numbers)


def test_tags_cannot_break_the_table(write_pad: Make):
    numbers = as_json(gather_statistics(write_pad(record("a.png", label(0, 0, 9, 9, "a|b\n<img> `c`"))), TOKENS))
    assert "| a\\|b &lt;img> \\`c\\` | 1 |" in as_markdown(numbers).splitlines()


def test_the_command_writes_numbers_tags_and_a_picture(pad: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["stats", str(pad), "--output", str(out), "--grid", "4", "--side", "64"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["stats.json", "stats.md", "stats.png", "tags.tsv"]
    assert json.loads((out / "stats.json").read_text())["tokens"]["regions_without_token"] == 2
    assert (out / "tags.tsv").read_text().splitlines() == ["tag\tregions", "sky\t2", "dog|cat\t1", "dot\t1"]
    assert Image.open(out / "stats.png").width > 1000


def test_a_picture_without_matplotlib_is_refused_before_the_work(pad: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["stats", str(pad)])
    assert result.exit_code == 2
    assert "--no-plots" in result.output
    assert not Path(f"{pad}.stats").exists()
    assert CliRunner().invoke(app, ["stats", str(pad), "--no-plots"]).exit_code == 0
    assert not (Path(f"{pad}.stats") / "stats.png").exists()
