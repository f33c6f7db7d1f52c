from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from patch_aligned.results.run import RunFileError, Score, find_runs, read_run, read_samples, rows_sha256, write_run
from tests.patch_aligned.results.conftest import result_of, samples_of

Make = Callable[..., Any]
HITS = {"acc": [1.0, 0.0, 1.0]}
SCORES = {"acc": Score(2 / 3, 0.27, 3, "share")}


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    samples = [replace(sample, answer="Äpfel\n[0.1, …") for sample in samples_of(HITS)]
    result = result_of(samples, SCORES, not_available={"SPICE": "no jars"}, submission="submission.json")
    write_run(tmp_path / "run", result, samples)
    assert read_run(tmp_path / "run") == result
    assert read_samples(tmp_path / "run") == samples
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["result.json", "samples.jsonl"]


def test_the_file_has_the_agreed_shape(tmp_path: Path) -> None:
    samples = samples_of(HITS)
    write_run(tmp_path, result_of(samples, SCORES), samples)
    document = json.loads((tmp_path / "result.json").read_text())
    assert list(document) == [
        "format", "benchmark", "tables", "column", "task", "model", "harness", "libraries", "settings", "data",
        "headline", "scores", "submission", "not_available",
    ]  # fmt: skip
    assert document["format"] == 1
    assert document["scores"] == {"acc": {"value": 2 / 3, "stderr": 0.27, "rows": 3, "unit": "share"}}
    first = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert first == {
        "id": "0", "prompt": "question 0", "answer": "answer 0", "target": [0.1, 0], "scores": {"acc": 1.0},
        "group": None,
    }  # fmt: skip


def test_the_hash_of_rows_depends_on_ids_targets_and_order_alone() -> None:
    rows = [("a", {"x": 1, "y": 2}), ("b", None)]
    assert rows_sha256(rows) == rows_sha256([("a", {"y": 2, "x": 1}), ("b", None)])
    others = ([rows[1], rows[0]], [("a", {"x": 1, "y": 3}), rows[1]], [("c", rows[0][1]), rows[1]], rows[:1])
    assert len({rows_sha256(rows), *map(rows_sha256, others)}) == 5


def set_field(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        document = document[name]
    if value is ...:
        del document[last]
    else:
        document[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, "field 'format': found 2, expected 1: run the benchmark again"),
        ("model.sha256", ..., "field 'model.sha256': found nothing"),
        ("data.shard", 1, "field 'data.shard': found 1"),
        ("tables", [5, "6"], "field 'tables[1]': found '6'"),
        ("data.rows", True, "field 'data.rows': found True"),
        ("settings.box_frame", "padded", "field 'settings.box_frame': found 'padded'"),
        ("scores.acc.value", "0.5", "field 'scores.acc.value': found '0.5'"),
        ("scores.acc.value", float("nan"), "field 'scores.acc.value': found nan"),
        ("scores.acc.value", 43.33, "field 'scores.acc.value': found 43.33, expected a share from 0 to 1"),
        ("scores.acc.stderr", -1.0, "field 'scores.acc.stderr': found -1.0"),
        ("scores", [], "field 'scores': found []"),
        ("headline", "iou", "field 'headline': found 'iou', expected one of the scores: 'acc'"),
        ("not_available", {"acc": "no"}, "field 'not_available': found 'acc', which has a score too"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, path: str, value: Any, message: str) -> None:
    samples = samples_of(HITS)
    write_run(tmp_path, result_of(samples, SCORES), samples)
    document = json.loads((tmp_path / "result.json").read_text())
    set_field(document, path, value)
    (tmp_path / "result.json").write_text(json.dumps(document))
    with pytest.raises(RunFileError) as error:
        read_run(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'result.json'}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "Expecting property name"), ("[]", "found []"), ("", "Expecting value")]
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(RunFileError, match=r"result\.json: ") as error:
        read_run(tmp_path)
    assert message in str(error.value)


def test_samples_of_another_run_are_refused(tmp_path: Path) -> None:
    samples = samples_of(HITS)
    write_run(tmp_path, result_of(samples, SCORES), samples)
    place = tmp_path / "samples.jsonl"
    lines = place.read_text().splitlines(keepends=True)
    for text, message in [
        ("".join(lines[:2]), "found 2 rows, expected 3 as 'data.rows'"),
        ("".join([lines[0], lines[0], lines[2]]), "line 2, field 'id': found '0' a second time"),
        ("".join([lines[1], lines[0], lines[2]]), "the files belong to different runs"),
        (lines[0] + lines[1].replace('"id": "1"', '"id": 1'), "line 2: field 'id': found 1"),
    ]:
        place.write_text(text)
        with pytest.raises(RunFileError, match=r"samples\.jsonl: ") as error:
            read_samples(tmp_path)
        assert message in str(error.value)
    place.write_bytes(lines[0].encode() + b'{"id": "\xff"}\n')
    with pytest.raises(RunFileError, match=r"samples\.jsonl: line 2: .*invalid unicode"):
        read_samples(tmp_path)


def test_what_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    samples = samples_of(HITS)
    result = result_of(samples, SCORES)
    for bad_result, bad_samples, message in [
        (result, samples[:2], "found 2 rows, expected 3"),
        (replace(result, headline="iou"), samples, "expected one of the scores"),
        (replace(result, scores={"acc": Score(float("inf"), None, 3, "share")}), samples, "JSON does not hold"),
        (result, [replace(samples[0], target={1, 2}), *samples[1:]], "JSON does not hold"),
        (result, [replace(samples[0], answer="\ud800"), *samples[1:]], "JSON does not hold"),
        (result, [replace(samples[0], id=0), *samples[1:]], "line 1: field 'id': found 0"),
        (replace(result, tables=("5",)), samples, "field 'tables[0]': found '5'"),
    ]:
        with pytest.raises(RunFileError) as error:
            write_run(tmp_path, bad_result, bad_samples)
        assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_run_that_stops_midway_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_of(HITS)
    write_run(tmp_path, result_of(samples, SCORES), samples)
    replaced = Path.replace

    def fail_at_result(self: Path, target: Path) -> Path:
        if target.name == "result.json":
            raise OSError("disk full")
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", fail_at_result)
    with pytest.raises(OSError, match="disk full"):
        write_run(tmp_path, result_of(samples, SCORES), samples)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_runs_are_found_in_folders_of_runs(make_run: Callable[..., Path], tmp_path: Path) -> None:
    b, a, other = make_run("one/b", HITS), make_run("one/a", HITS), make_run("two/c", HITS)
    (tmp_path / "one" / "unfinished").mkdir()
    assert [run.folder for folder in (other, tmp_path / "one") for run in find_runs(folder)] == [other, a, b]
    with pytest.raises(RunFileError, match=r"unfinished: found no result\.json"):
        find_runs(tmp_path / "one" / "unfinished")
