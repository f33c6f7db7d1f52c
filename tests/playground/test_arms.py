"""Training files of the controls: what changes, and that nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from patch_aligned.pad import read_annotations
from playground.mini.arms import derange_names, main
from playground.mini.make_scenes import make_dataset
from playground.mini.scene_records import DatasetSettings
from playground.mini.sprites import HELD_OUT, held_out_names, load_sprites

HELD_OUT_SEED = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("arms") / "train"
    make_dataset(DatasetSettings(30, held_out_seed=HELD_OUT_SEED), out, progress=False)
    return out


def made(data: Path, arm: str, *flags: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Path]:
    out = data.parent / "_".join((arm, *flags))
    main([str(data), arm, "--out", str(out), *flags])
    assert len(list(read_annotations(out / "pad.json"))) == 30
    return *(read(out / name) for name in ("train.json", "pad.json")), out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def mask_of(label: dict[str, Any]) -> np.ndarray:
    return coco_mask.decode({"size": [224, 224], "counts": label["rle_mask"].encode()}).astype(bool)


def test_tags_follow_the_caption(data: Path) -> None:
    train, pad, _ = made(data, "tags")
    assert pad == read(data / "pad.json")
    for record, before, regions in zip(train, read(data / "train.json"), pad, strict=True):
        caption, tags = record["conversations"][1]["value"].removesuffix(".").split(" Objects: ")
        assert caption == regions["caption"]
        assert sorted(tags.split(", ")) == sorted({label["tag"] for label in regions["labels"]})
        assert record["conversations"][0] == before["conversations"][0]


def test_a_derangement_moves_every_name_within_its_kind_and_block() -> None:
    sprites = {sprite.name: sprite for sprite in load_sprites(simple_only=True)}
    held_out = held_out_names(HELD_OUT_SEED)
    for seed in range(5):
        mapping = derange_names(seed, HELD_OUT_SEED)
        assert mapping.keys() == set(mapping.values()) == sprites.keys()
        for name, other in mapping.items():
            assert name != other
            assert (sprites[name].category, sprites[name].tokens) == (sprites[other].category, sprites[other].tokens)
            assert [name in block for block in (HELD_OUT, held_out)] == [
                other in block for block in (HELD_OUT, held_out)
            ]
        assert mapping == derange_names(seed, HELD_OUT_SEED) != derange_names(seed + 1, HELD_OUT_SEED)


def test_deranged_records_differ_in_the_names_of_objects_alone(data: Path) -> None:
    train, pad, out = made(data, "deranged", "--seed", "3")
    mapping = read(out / "names.json")
    assert mapping == derange_names(3, HELD_OUT_SEED)
    assert train == read(data / "train.json")
    for record, before in zip(pad, read(data / "pad.json"), strict=True):
        for label in before["labels"]:
            if label["kind"] == "object":
                label["tag"] = mapping[label["tag"]]
        assert record == before


def test_union_masks_are_those_of_all_objects(data: Path) -> None:
    train, pad, _ = made(data, "union")
    assert train == read(data / "train.json")
    for record, before in zip(pad, read(data / "pad.json"), strict=True):
        union = np.any([mask_of(label) for label in before["labels"] if label["kind"] == "object"], axis=0)
        rows, cols = np.nonzero(union)
        for label, was in zip(record["labels"], before["labels"], strict=True):
            if label["kind"] == "object":
                assert np.array_equal(mask_of(label), union)
                assert label["bbox"] == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
                label |= {"bbox": was["bbox"], "rle_mask": was["rle_mask"]}
        assert record == before


def test_only_scenes_of_the_simple_style_are_deranged(tmp_path: Path) -> None:
    make_dataset(DatasetSettings(2, style="full"), tmp_path / "full", progress=False)
    for data, arm, message in (("full", "deranged", "'full'"), ("none", "tags", "dataset.json")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main([str(tmp_path / data), arm, "--out", str(tmp_path / "out")])
