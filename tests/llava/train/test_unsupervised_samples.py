"""Samples without supervised tokens are listed and counted, and stop a run only where they are many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.train.llava_trainer import UnsupervisedSamples
from tests.training import logged


def book(path: Path) -> UnsupervisedSamples:
    return UnsupervisedSamples(path / "list.jsonl", lambda counts: counts)


def test_they_are_listed_and_counted(tmp_path: Path) -> None:
    samples = book(tmp_path)
    samples.add(["a", "b"], [3, 0], step=0)
    samples.close_step(0)
    assert [json.loads(line) for line in samples.path.read_text().splitlines()] == [{"step": 0, "id": "b"}]
    assert samples.state_dict() == {"seen": 2, "unsupervised": 1}


def test_nothing_is_written_where_all_are_supervised(tmp_path: Path) -> None:
    samples = book(tmp_path)
    samples.add(["a"], [1], step=0)
    samples.close_step(0)
    assert not samples.path.exists()


def test_a_small_batch_of_nothing_else_counts_as_any(tmp_path: Path) -> None:
    samples = book(tmp_path)
    samples.add(["a"], [0], step=7)
    samples.close_step(7)
    samples.add(["b"], [3], step=8)
    samples.close_step(8)
    samples.close_run()
    assert samples.state_dict() == {"seen": 2, "unsupervised": 1}


def test_a_run_of_nothing_else_is_an_error(tmp_path: Path) -> None:
    samples = book(tmp_path)
    samples.add(["a"], [0], step=0, skipped=1)
    samples.close_step(0)
    with pytest.raises(ValueError, match="2 of 2"):
        samples.close_run()


def test_skipped_samples_count_against_the_same_limit(tmp_path: Path) -> None:
    samples = book(tmp_path)
    samples.add([f"s{i}" for i in range(30)], [0] * 4 + [1] * 26, step=0, skipped=7)
    with pytest.raises(ValueError, match="11 of 37"):
        samples.close_step(0)


@pytest.mark.parametrize(("bad", "stops"), [(10, False), (11, True)])
def test_more_than_one_in_a_hundred_stops(tmp_path: Path, bad: int, stops: bool) -> None:
    samples = book(tmp_path)
    samples.add([f"s{i}" for i in range(1000)], [0] * bad + [1] * (1000 - bad), step=0)
    if not stops:
        samples.close_step(0)
        return
    with pytest.raises(ValueError, match=r"11 of 1000 .*1%"):
        samples.close_step(0)


def test_such_a_sample_leaves_the_loss_as_it_is(run_stage_1: Any) -> None:
    records = json.loads(Path("data_plain.json").read_text())
    empty = records[0] | {"id": "empty"}
    empty["conversations"] = [empty["conversations"][0], {"from": "gpt", "value": ""}]
    mixed = [*json.loads(Path("data_mix.json").read_text())[:3]]
    Path("clean.json").write_text(json.dumps(mixed))
    Path("with_empty.json").write_text(json.dumps([*mixed, empty]))
    clean = run_stage_1("clean", "--version v1 --data_path clean.json")
    with_empty = run_stage_1("with_empty", "--version v1 --data_path with_empty.json")
    assert logged(with_empty) == pytest.approx(logged(clean), rel=1e-6)
    listed = [json.loads(line)["id"] for line in Path("with_empty/unsupervised_samples.jsonl").read_text().splitlines()]
    assert listed == ["empty"] * 5


def test_a_run_whose_images_cannot_be_read_saves_nothing(run_stage_1: Any) -> None:
    with pytest.raises(ValueError, match="4 of 4"):
        run_stage_1("run", "--on_error skip --image_folder elsewhere --num_train_epochs 1")
    assert not Path("run/mm_projector.bin").exists()
