"""The `mini_*` tasks run in lmms-eval: prompts as in stage 2, scores of known answers, one text at every batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from pyarrow import parquet

from eval.benchmarks import BENCHMARKS, LocalData
from patch_aligned.cells import boxes_xyxy_to_square01
from playground.mini.evaluation_set import OUT, SELECTIONS, Selection, make_evaluation_set

pytest.importorskip("lmms_eval", reason="lmms-eval is part of the extra `eval`")

ROOT = Path(__file__).parents[3]
TASKS = ROOT / "eval" / "lmms_tasks" / "mini"
NAMES = ("counting", "existence", "colour", "position", "rec")
MINI = [benchmark for benchmark in BENCHMARKS.values() if benchmark.task_folder == "mini"]
SMALL = (
    Selection("existence", "existence", "simple", rows=8, per_answer=4),
    Selection("colour", "colour", "simple", rows=4, per_answer=1),
    Selection("position", "position", "simple", rows=4, per_answer=2),
    Selection("counting", "count", "simple", rows=3, per_answer=1),
)
REFERRING_ROWS = 24


def test_tasks_registry_and_evaluation_set_name_the_same_files() -> None:
    assert {benchmark.name for benchmark in MINI} == {f"mini_{name}" for name in NAMES}
    assert {selection.name for selection in SELECTIONS} | {"rec"} == set(NAMES)
    shared = yaml.load((TASKS / "_mini_yaml").read_text(), yaml.BaseLoader)
    for benchmark in MINI:
        task = {**shared, **yaml.load((TASKS / f"{benchmark.task}.yaml").read_text(), yaml.BaseLoader)}
        assert task["task"] == benchmark.task
        assert isinstance(benchmark.data, LocalData)
        assert task["dataset_kwargs"]["data_files"] == {benchmark.data.split: benchmark.data.path}
        assert (ROOT / benchmark.data.path).parent == OUT
        assert int(task["generation_kwargs"]["max_new_tokens"]) == benchmark.max_new_tokens
        assert benchmark.headline in {metric["metric"] for metric in task["metric_list"]}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """A small evaluation set where the tasks look for it, below the working directory."""
    folder = tmp_path / "playground" / "data" / "mini" / "eval"
    make_evaluation_set(folder, selections=SMALL, referring_rows=REFERRING_ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return {name: parquet.read_table(folder / f"{name}.parquet").to_pylist() for name in NAMES}


def spoken_in_the_square(row: dict[str, Any]) -> str:
    edges = boxes_xyxy_to_square01(row["box_xyxy_px"], (row["width"], row["height"])).tolist()
    return str([round(edge, 2) for edge in edges])


@pytest.mark.slow
def test_known_answers_score_as_worked_out_by_hand(
    rows: dict[str, list[dict[str, Any]]], listed_model: Any, run_task: Any
) -> None:
    def scores(name: str, answers: list[str]) -> dict[str, float]:
        listed_model.answers = answers
        found = run_task(listed_model, f"mini_{name}", TASKS)["results"][f"mini_{name}"]
        assert listed_model.asked == [row["question"] for row in rows[name]]
        return {key.removesuffix(",none"): value for key, value in found.items() if key.endswith(",none")}

    for name in ("colour", "position"):
        truth = [row["answer"] for row in rows[name]]
        found = scores(name, [f"The {truth[0]}.", truth[1].upper(), "It is hard to say.", truth[3]])
        assert found["exact_match"] == 0.75
        assert found["exact_match_stderr"] == pytest.approx(0.25)  # the square root of 3/4 * 1/4 / 3

    counts = [int(row["answer"]) for row in rows["counting"]]
    found = scores("counting", [str(counts[0]), str(counts[1] + 1), str(counts[2] + 2)])
    assert (found["exact_match"], found["within_one"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))

    # Always yes, of eight rows of which four are: precision 1/2, recall 1.
    found = scores("existence", ["Yes"] * 8)
    assert (found["exact_match"], found["yes_share"], found["f1"]) == (0.5, 1, pytest.approx(2 / 3))
    found = scores("existence", [row["answer"] for row in rows["existence"]])
    assert (found["exact_match"], found["yes_share"], found["f1"]) == (1, 0.5, 1)

    found = scores("rec", ["nowhere", *map(spoken_in_the_square, rows["rec"][1:])])
    assert found["acc@0.5 padded frame undone"] == pytest.approx(1 - 1 / REFERRING_ROWS)
    assert found["not parsed"] == pytest.approx(1 / REFERRING_ROWS)
    square = [row["width"] == row["height"] for row in rows["rec"][1:]]
    assert 0 < sum(square) < len(square)
    assert sum(square) / REFERRING_ROWS <= found["acc@0.5 read in image frame"] < found["acc@0.5 padded frame undone"]
    # On square pictures the frames are one.
    assert found["mean IoU read in image frame"] < found["mean IoU padded frame undone"]


@pytest.mark.slow
@pytest.mark.golden
def test_batches_of_1_and_8_give_the_same_texts(
    golden_world: Path, rows: dict[str, list[dict[str, Any]]], texts_of_batches: Any
) -> None:
    from lmms_eval.models.simple.llava import Llava

    texts = texts_of_batches(Llava, [f"mini_{name}" for name in NAMES], TASKS)
    assert texts[1] == texts[8]
    assert {task: len(found) for task, found in texts[1].items()} == {
        f"mini_{name}": len(found) for name, found in rows.items()
    }
    assert all(len(set(found)) > 1 for found in texts[1].values()), "all answers alike show nothing"
