"""The published folder: Parquet files that `datasets` and our reader load, and a card that says what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from patch_aligned.cli import app
from patch_aligned.dataset.publish import publish
from patch_aligned.pad import read_annotations
from tests.patch_aligned.dataset.conftest import label, record

Make = Callable[..., Any]


@pytest.fixture
def pad(write_pad: Make) -> Path:
    records = [record(f"{number}.png", label(8, 0, 72, 64, "sky", score=0.5), split="x") for number in range(5)]
    return write_pad(*records)


def test_files_hold_all_records_in_order(pad: Path, tmp_path: Path):
    folder = tmp_path / "out"
    published = publish(pad, folder, name="me/pad", records_per_file=2, plots=False)
    names = [f"train-0000{number}-of-00003.parquet" for number in range(3)]
    assert [path.name for path in published.files] == names
    images = [image for path in published.files for image in read_annotations(path)]
    assert images == list(read_annotations(pad))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "data", "stats.json"]
    assert json.loads((folder / "stats.json").read_text())["file"] == "pad.json"  # no path of this machine


def test_the_folder_loads_with_datasets(pad: Path, tmp_path: Path):
    publish(pad, tmp_path / "out", name="me/pad", records_per_file=2, plots=False)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["image_id"][:] == [f"{number}.png" for number in range(5)]
    assert loaded[4]["labels"][0]["tag"] == "sky"
    assert json.loads(loaded[0]["labels"][0]["extra_json"]) == {"score": 0.5}


def test_the_card_has_numbers_settings_and_licence(pad: Path, tmp_path: Path):
    settings = {"box_threshold": 0.25, "models": {"sam": {"sha256": "12|3"}}}
    Path(f"{pad}.settings.json").write_text(json.dumps(settings))
    publish(pad, tmp_path / "out", name="me/pad", licence="cc-by-4.0", plots=False)
    front, card = (tmp_path / "out" / "README.md").read_text().split("\n---\n")
    assert front.startswith('---\nlicense: "cc-by-4.0"\n')
    assert "size_categories: [n<1K]" in front
    assert "| regions | 5 |" in card and "| sky | 5 |" in card
    assert "| `models.sam.sha256` | `12\\|3` |" in card
    assert "further values of the region as JSON (`score`), or null" in card
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == settings


def test_what_is_not_known_is_left_open(pad: Path, tmp_path: Path):
    result = CliRunner().invoke(app, ["publish", str(pad), "--output", str(tmp_path / "out"), "--name", "me/pad"])
    assert result.exit_code == 0, result.output
    assert "hf upload me/pad" in result.output and "Choose a licence" in result.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# license: choose one" in card and "Not recorded" in card
    assert "![Tags, regions, masks and tokens](stats.png)" in card and (tmp_path / "out" / "stats.png").is_file()


def test_a_folder_with_files_and_broken_settings_are_refused(pad: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        publish(pad, tmp_path / "images", name="me/pad")
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match=r"settings\.json, settings of an annotation run: found \[\]"):
        publish(pad, tmp_path / "out", name="me/pad", settings=tmp_path / "settings.json")
    assert not (tmp_path / "out").exists()


def test_a_file_without_records_is_not_published(write_pad: Make, tmp_path: Path):
    with pytest.raises(ValueError, match=r"pad\.json: found no record"):
        publish(write_pad(), tmp_path / "out", name="me/pad", plots=False)
    assert not (tmp_path / "out").exists()
