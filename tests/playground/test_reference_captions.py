"""Several captions of a scene: the one in its record first, all different, all true, the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from playground.mini.make_scenes import make_dataset
from playground.mini.reference_captions import CAPTIONS, caption_dataset, main
from playground.mini.scene_records import DatasetSettings, compose


@pytest.mark.parametrize("style", ["simple", "full"])
def test_scenes_have_several_captions_and_the_records_own_first(tmp_path: Path, style: str) -> None:
    make_dataset(DatasetSettings(6, seed=5, split="heldout", style=style), tmp_path, progress=False)
    path = caption_dataset(tmp_path, progress=False)
    written = json.loads(path.read_text())
    pad = json.loads((tmp_path / "pad.json").read_text())
    assert [(record["image"], record["captions"][0]) for record in written] == [
        (record["image_id"], record["caption"]) for record in pad
    ]
    for record in written:
        assert 3 < len(set(record["captions"])) == len(record["captions"]) <= CAPTIONS
    text = path.read_text()
    assert caption_dataset(tmp_path, progress=False).read_text() == text


def test_each_caption_of_a_simple_scene_names_the_same_things(tmp_path: Path) -> None:
    make_dataset(DatasetSettings(6, seed=5, split="heldout"), tmp_path, progress=False)
    for index, record in enumerate(json.loads(caption_dataset(tmp_path, progress=False).read_text())):
        scene, _ = compose(DatasetSettings(6, seed=5, split="heldout"), index)
        for caption in record["captions"]:
            for item in scene.objects:
                words = {item.sprite.name, item.sprite.plural}
                assert any(word in caption.lower() for word in words) == any(item is other for other in scene.captioned)


def test_a_folder_without_scenes_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"found no dataset\.json and pad\.json; next: bash scripts"):
        main(["--data", str(tmp_path)])
