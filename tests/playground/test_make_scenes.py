"""The data set's files: valid, joined by image path, reproducible, resumable."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from patch_aligned.pad import read_annotations
from playground.mini import make_scenes
from playground.mini.make_scenes import main, make_dataset
from playground.mini.scene_records import DatasetSettings
from playground.mini.scenes import compose_scene
from playground.mini.show_scenes import contact_sheet
from playground.mini.sprites import HELD_OUT, TINTS, held_out_names, load_sprites

FILES = (
    "train.json",
    "pad.json",
    "instruct.json",
    "referring.json",
    "choices.json",
    "choices_instruct.json",
    "questions.jsonl",
    "answers.jsonl",
    "dataset.json",
)


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=["simple", "full"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "set"
    make_dataset(DatasetSettings(20, seed=5, style=request.param), out, progress=False)
    return out


def test_pad_is_valid_and_decodes_to_masks_of_the_picture(dataset: Path) -> None:
    images = list(read_annotations(dataset / "pad.json"))
    assert len(images) == 20
    for image in images:
        with Image.open(dataset / image.image_id) as picture:
            assert picture.size == image.size_wh
        width, height = image.size_wh
        for region in image.regions:
            mask = coco_mask.decode({"size": [height, width], "counts": region.rle_mask.encode()})
            x, y, w, h = coco_mask.toBbox({"size": [height, width], "counts": region.rle_mask.encode()})
            assert mask.shape == (height, width)
            assert region.bbox_xyxy_px == (x, y, x + w, y + h)
            assert region.extra["kind"] in ("object", "background")
        assert image.extra["split"] == "train"


def test_labels_say_what_later_measures_need(dataset: Path) -> None:
    for record in read(dataset / "pad.json"):
        objects = [label for label in record["labels"] if label["kind"] == "object"]
        assert {label["kind"] for label in record["labels"]} == {"object", "background"}
        areas = [
            int(coco_mask.area({"size": record["size"][::-1], "counts": label["rle_mask"].encode()}))
            for label in objects
        ]
        assert [label["area_px"] for label in objects] == areas
        assert [label["rank"] for label in objects] == [1 + sum(other > area for other in areas) for area in areas]
        for label in objects:
            word = next(sprite for sprite in load_sprites() if sprite.name == label["tag"])
            said = re.search(rf"\b({word.name}|{word.plural})\b", record["caption"].lower())
            assert label["in_caption"] == bool(said)
            assert label["held_out"] == (label["tag"] in HELD_OUT)
            assert label["colour"] in (None, *TINTS)


def test_the_held_out_seed_changes_texts_and_no_picture(tmp_path: Path) -> None:
    for seed in (None, 1):
        make_dataset(DatasetSettings(60, held_out_seed=seed), tmp_path / str(seed), progress=False)
    pictures = [{path.read_bytes() for path in (tmp_path / str(seed)).rglob("*.jpg")} for seed in (None, 1)]
    assert pictures[0] == pictures[1]
    captions = [[record["caption"] for record in read(tmp_path / str(seed) / "pad.json")] for seed in (None, 1)]
    texts = [" ".join(captions[0]).lower(), " ".join(captions[1]).lower()]
    held_out = held_out_names(1) - HELD_OUT
    assert any(re.search(rf"\b{name}\b", texts[0]) for name in held_out)
    assert not any(re.search(rf"\b{name}\b", texts[1]) for name in held_out)


def test_scenes_are_the_same_on_every_machine(tmp_path: Path) -> None:
    """Texts, boxes and masks by their hash; colours within rounding, since the sine of float32 differs between CPUs."""
    make_dataset(DatasetSettings(20, seed=5), tmp_path / "set", progress=False)
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((tmp_path / "set" / name).read_bytes())
    assert digest.hexdigest() == "6178ccee599eec3ffd551007bd57a5c91c5e519122737e298d60ed455580c95e"
    means = [compose_scene(5, "train", "simple", index)[0].picture.mean() for index in range(4)]
    np.testing.assert_allclose(means, [146.887, 99.281, 89.607, 106.457], atol=0.05)


def test_training_file_and_pad_join_by_image_path_with_the_same_caption(dataset: Path) -> None:
    captions = {record["image_id"]: record["caption"] for record in read(dataset / "pad.json")}
    train = read(dataset / "train.json")
    assert {record["image"]: record["conversations"][1]["value"] for record in train} == captions
    assert all(record["conversations"][0]["value"].count("<image>") == 1 for record in train)
    assert len({record["id"] for record in train}) == 20


def test_conversations_mix_scenes_with_some_that_have_no_picture(dataset: Path) -> None:
    records = read(dataset / "instruct.json")
    without = [record for record in records if "image" not in record]
    assert (len(records), len(without)) == (22, 2)
    assert not any("<image>" in turn["value"] for record in without for turn in record["conversations"])


def test_each_question_has_its_answer(dataset: Path) -> None:
    questions, answers = read(dataset / "questions.jsonl"), read(dataset / "answers.jsonl")
    ids = [question["question_id"] for question in questions]
    assert len(set(ids)) == len(ids) and ids == [answer["question_id"] for answer in answers]
    assert all((dataset / question["image"]).is_file() for question in questions)


def test_expressions_carry_the_box_of_their_region(dataset: Path) -> None:
    labels = {record["image_id"]: record["labels"] for record in read(dataset / "pad.json")}
    records = read(dataset / "referring.json")
    assert records
    for record in records:
        label = labels[record["image"]][record["label_index"]]
        assert label["bbox"] == record["bbox_xyxy_px"] and label["kind"] == "object"
        width, height = record["size"]
        side = max(width, height)
        padding = np.array([side - width, side - height] * 2) // 2
        square = (np.array(record["bbox_xyxy_px"]) + padding) / side
        np.testing.assert_allclose(record["bbox_square01"], square, atol=1e-6)
        np.testing.assert_allclose(json.loads(record["answer"]), square, atol=0.005 + 1e-9)


def test_the_same_settings_give_the_same_bytes_whatever_the_workers(tmp_path: Path, dataset: Path) -> None:
    style = "simple" if dataset.parent.name.startswith("simple") else "full"
    again = tmp_path / "again"
    make_dataset(DatasetSettings(20, seed=5, style=style), again, workers=2, progress=False)
    expected = {name: data for name, data in contents(dataset).items() if name != "overview.png"}
    assert contents(again) == expected


def test_a_larger_count_begins_with_the_same_scenes(tmp_path: Path, dataset: Path) -> None:
    style = "simple" if dataset.parent.name.startswith("simple") else "full"
    make_dataset(DatasetSettings(60, seed=5, style=style), tmp_path / "more", progress=False)
    for name in ("train.json", "pad.json"):
        assert read(tmp_path / "more" / name)[:20] == read(dataset / name)
    first = read(dataset / "train.json")[0]["image"]
    assert (tmp_path / "more" / first).read_bytes() == (dataset / first).read_bytes()


def test_held_out_scenes_share_no_picture_with_the_training_scenes(tmp_path: Path) -> None:
    for split in ("train", "heldout"):
        make_dataset(DatasetSettings(30, seed=5, split=split), tmp_path / split, progress=False)
    pictures = {s: {p.read_bytes() for p in (tmp_path / s).rglob("*.jpg")} for s in ("train", "heldout")}
    assert len(pictures["train"]) == len(pictures["heldout"]) == 30
    assert not pictures["train"] & pictures["heldout"]
    names = {s: {p.name for p in (tmp_path / s).rglob("*.jpg")} for s in ("train", "heldout")}
    assert not names["train"] & names["heldout"]
    assert {record["split"] for record in read(tmp_path / "heldout" / "pad.json")} == {"heldout"}


def test_an_interrupted_run_goes_on_after_its_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DatasetSettings(12, seed=1)
    monkeypatch.setattr(make_scenes, "SCENES_PER_PART", 5)
    make_dataset(settings, tmp_path / "whole", progress=False)

    out = tmp_path / "interrupted"
    make_part = make_scenes._make_part

    def stop_in_the_third_part(job: tuple[DatasetSettings, int, Path]) -> int:
        if job[1] == 10:
            raise KeyboardInterrupt
        return make_part(job)

    monkeypatch.setattr(make_scenes, "_make_part", stop_in_the_third_part)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(settings, out, progress=False)
    assert not any((out / name).exists() for name in FILES)

    made: list[int] = []

    def record_the_part(job: tuple[DatasetSettings, int, Path]) -> int:
        made.append(job[1])
        return make_part(job)

    monkeypatch.setattr(make_scenes, "_make_part", record_the_part)
    make_dataset(settings, out, progress=False)
    assert made == [10]
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_data_set_is_left_alone_and_one_of_other_settings_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "set"
    settings = DatasetSettings(3)
    summary = make_dataset(settings, out, progress=False)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert make_dataset(settings, out, progress=False) == summary
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ValueError, match=r"another data set.*'seed': 0.*asked for.*'seed': 9.*--out"):
        make_dataset(DatasetSettings(3, seed=9), out, progress=False)


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ValueError, match=r"already holds train\.json"):
        make_dataset(DatasetSettings(3), tmp_path, progress=False)
    assert (tmp_path / "train.json").read_text() == "[]"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--count", "2", "--out", str(tmp_path / "set"), "--split", "heldout", "--size", "128x96"]
    main(arguments)
    assert "2 train, 2 pad" in capsys.readouterr().out
    assert {tuple(record["size"]) for record in read(tmp_path / "set" / "pad.json")} == {(128, 96)}
    with pytest.raises(SystemExit, match=r"error: .*another data set"):
        main([*arguments, "--seed", "4"])
    with pytest.raises(SystemExit):
        main(["--count", "2", "--out", str(tmp_path), "--size", "big"])
    assert "WIDTHxHEIGHT" in capsys.readouterr().err


def test_overview_shows_the_asked_number_of_scenes(dataset: Path) -> None:
    sheet = contact_sheet(dataset, count=5, columns=2)
    cell_width, cell_height = sheet.width // 2, sheet.height // 3
    cells = [
        np.asarray(sheet)[row * cell_height : (row + 1) * cell_height, col * cell_width : (col + 1) * cell_width]
        for row in range(3)
        for col in range(2)
    ]
    assert [bool((cell < 255).any()) for cell in cells] == [True] * 5 + [False]
