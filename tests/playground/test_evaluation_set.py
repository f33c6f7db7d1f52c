"""The miniature's benchmarks: balanced, true to their scenes, the same for the same seed, whole or absent."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from playground.mini.evaluation_set import REFERRING_SIZES_WH, Selection, main, make_evaluation_set
from playground.mini.make_scenes import make_dataset
from playground.mini.questions import BOX_FORMAT, SHORT_ANSWER
from playground.mini.scene_records import DatasetSettings
from playground.mini.scenes import compose_scene

SELECTIONS = (
    Selection("existence", "existence", "simple", rows=8, per_answer=4),
    Selection("position", "position", "simple", rows=6, per_answer=2),
    Selection("counting", "count", "full", rows=6, per_answer=2),
)
REFERRING_ROWS = 20

Tables = dict[str, list[dict[str, Any]]]


def read(folder: Path) -> Tables:
    return {path.stem: parquet.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval")
    make_evaluation_set(out, seed=3, selections=SELECTIONS, referring_rows=REFERRING_ROWS)
    return out


@pytest.fixture(scope="module")
def tables(folder: Path) -> Tables:
    return read(folder)


def test_each_benchmark_has_its_rows_and_balanced_answers(tables: Tables) -> None:
    assert {name: len(rows) for name, rows in tables.items()} == {
        "counting": 6, "existence": 8, "position": 6, "rec": 20,
    }  # fmt: skip
    answers = {name: Counter(row["answer"] for row in rows) for name, rows in tables.items() if name != "rec"}
    assert answers["existence"] == {"Yes": 4, "No": 4}
    assert answers["position"] == {"left": 2, "middle": 2, "right": 2}
    assert max(answers["counting"].values()) == 2 and len(answers["counting"]) >= 3
    for rows in tables.values():
        assert len({row["id"] for row in rows}) == len(rows)


def test_questions_are_those_that_make_scenes_asks_about_the_same_pictures(tables: Tables, tmp_path: Path) -> None:
    """Row by row the same question, answer and pixels as in `questions.jsonl` and `images` of the held-out scenes."""
    make_dataset(DatasetSettings(count=4, seed=3, split="heldout"), tmp_path / "heldout", progress=False)
    lines = {}
    for name in ("questions", "answers"):
        text = (tmp_path / "heldout" / f"{name}.jsonl").read_text()
        lines[name] = {record["question_id"]: record for record in map(json.loads, text.splitlines())}
    for row in tables["existence"]:
        question = lines["questions"][row["id"]]
        assert (row["question"], row["answer"]) == (question["text"], lines["answers"][row["id"]]["answer"])
        assert row["question"].endswith(SHORT_ANSWER)
        assert row["image"]["bytes"] == (tmp_path / "heldout" / question["image"]).read_bytes()
        assert row["id"].startswith(f"{row['scene']}-")


def test_counts_are_those_of_the_scene(tables: Tables) -> None:
    for row in tables["counting"]:
        scene, _ = compose_scene(3, "heldout", "full", int(row["scene"].rsplit("-", 1)[1]))
        plural = row["question"].removeprefix("How many ").split(" are there?")[0]
        assert sum(item.sprite.plural == plural for item in scene.objects) == int(row["answer"])
        assert (row["width"], row["height"]) == scene.size_wh


def test_boxes_are_in_pixels_of_pictures_of_several_shapes(tables: Tables) -> None:
    assert {(row["width"], row["height"]) for row in tables["rec"]} == set(REFERRING_SIZES_WH)
    for row in tables["rec"]:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
            assert picture.size == (row["width"], row["height"])
        index, thing = map(int, row["id"].rsplit("-", 1)[0].rsplit("-", 2)[1:])
        scene, _ = compose_scene(3, "heldout", "simple", index, picture.size)
        rows, cols = np.nonzero(scene.objects[thing].mask)
        assert row["box_xyxy_px"] == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
        assert row["question"] == f"Where is {row['expression']}? {BOX_FORMAT}"


def test_the_files_load_as_those_of_the_hub_do(folder: Path, tmp_path: Path) -> None:
    table = datasets.load_dataset(
        "parquet", data_files={"test": str(folder / "position.parquet")}, split="test", cache_dir=str(tmp_path)
    )
    assert isinstance(table[0]["image"], Image.Image)


def test_the_seed_decides_and_finished_sets_stay(folder: Path, tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        return make_evaluation_set(tmp_path, seed=seed, selections=SELECTIONS[:1], referring_rows=2)

    summary = make(3)
    first = read(tmp_path)
    assert first["existence"] == read(folder)["existence"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert make(3) == summary
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times

    make(4)
    assert read(tmp_path)["existence"] != first["existence"]
    (tmp_path / "rec.parquet").unlink()  # not finished, then
    make(4)
    assert len(read(tmp_path)["rec"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.json", "existence.parquet", "rec.parquet"]


def test_a_negative_seed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--seed", "-1"])
    assert "--seed -1: expected a number from 0" in capsys.readouterr().err
