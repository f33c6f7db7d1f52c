"""The `rec_*` tasks and the shipped ones run in lmms-eval on local files, in this process and by its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from eval.benchmarks import BENCHMARKS
from eval.rec.boxes import ACCURACY, MEAN_IOU, METRICS, NOT_PARSED, Row, prompt_of, write_rows
from eval.rec.convert import PUBLISHED_EXPRESSIONS
from patch_aligned.cells import boxes_xyxy_to_square01
from tests.eval.conftest import write_local_task

pytest.importorskip("lmms_eval", reason="lmms-eval is part of the extra `eval`")

ROOT = Path(__file__).parents[3]
TASKS = ROOT / "eval" / "lmms_tasks" / "rec"
SIZE_WH = (64, 36)
BOXES = {"left": [2.0, 3.0, 20.0, 15.0], "right": [40.0, 20.0, 62.0, 34.0], "all": [2.0, 2.0, 62.0, 34.0]}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a data root of one picture and three expressions for it, and the hub's form of them."""
    folder = tmp_path / "playground" / "data"
    (folder / "coco").mkdir(parents=True)
    Image.new("RGB", SIZE_WH).save(folder / "coco" / "0.png")
    rows: list[Row] = [
        {"id": words, "image": "coco/0.png", "expression": words, "box_xyxy_px": box, "width": 64, "height": 36}
        for words, box in BOXES.items()
    ]
    write_rows(rows, folder / "eval" / "rec" / "refcocog_val.parquet")
    text, numbers = datasets.Value("string"), datasets.List(datasets.Value("float64"))
    hub = {"question_id": text, "image": datasets.Image(), "answer": datasets.List(text), "bbox": numbers}
    image = {"bytes": (folder / "coco" / "0.png").read_bytes()}
    hub_rows = [
        {"question_id": words, "image": image, "answer": [words, f"the {words}"], "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for words, (x1, y1, x2, y2) in BOXES.items()
    ]
    datasets.Dataset.from_list(hub_rows, features=datasets.Features(hub)).to_parquet(tmp_path / "hub.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return tmp_path


def test_there_is_a_task_for_each_split_and_it_reads_the_file_that_the_converter_writes() -> None:
    assert {f"{BENCHMARKS[name].task}.yaml" for name in PUBLISHED_EXPRESSIONS} == {p.name for p in TASKS.glob("*.yaml")}
    for name in PUBLISHED_EXPRESSIONS:
        config = yaml.safe_load((TASKS / f"{BENCHMARKS[name].task}.yaml").read_text())
        assert config["task"] == BENCHMARKS[name].task
        assert config["dataset_kwargs"]["data_files"] == {"test": f"playground/data/eval/rec/{name}.parquet"}


def spoken_in_the_square(box_xyxy_px: list[float]) -> str:
    return str([round(value, 2) for value in boxes_xyxy_to_square01(box_xyxy_px, SIZE_WH).tolist()])


def evaluate(tasks: list[str], include_path: Path) -> Any:
    """Runs tasks in this process on a model that knows the boxes and speaks them in the padded square."""
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    class Oracle(lmms):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[tuple[str, dict[str, Any], tuple[int, int]]] = []

        def generate_until(self, requests: list[Any]) -> list[str]:
            answers = []
            for request in requests:
                text, settings, doc_to_visual, doc_id, task, split = request.args
                row = self.task_dict[task][split][doc_id]
                (image,) = doc_to_visual(row)
                self.asked.append((text, settings, image.size))
                words = row.get("expression") or row["answer"].removeprefix("the ")
                answers.append(f"Sure: {spoken_in_the_square(BOXES[words])}")
            return answers

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    oracle = Oracle()
    manager = TaskManager(include_path=str(include_path), include_defaults=False, model_name="llava")
    return oracle.asked, simple_evaluate(model=oracle, tasks=tasks, task_manager=manager, bootstrap_iters=0)


@pytest.mark.slow
def test_a_perfect_answerer_of_the_padded_square_by_both_readings_of_one_run(world: Path) -> None:
    asked, found = evaluate(["rec_refcocog_val"], TASKS)
    assert [text for text, _, _ in asked] == [prompt_of(words) for words in BOXES]
    assert {size for _, _, size in asked} == {SIZE_WH}
    assert all(settings["max_new_tokens"] == 32 and settings["temperature"] == 0 for _, settings, _ in asked)
    scores = found["results"]["rec_refcocog_val"]
    assert scores[f"{ACCURACY['square']},none"] == 1
    assert scores[f"{ACCURACY['image']},none"] == pytest.approx(1 / 3)  # of the large box enough is left
    assert scores[f"{MEAN_IOU['square']},none"] > 0.9
    assert scores[f"{MEAN_IOU['image']},none"] < 0.5
    assert scores[f"{NOT_PARSED},none"] == 0
    sample = found["samples"]["rec_refcocog_val"][0]
    assert sample["target"] == BOXES["left"]
    assert sample["filtered_resps"] == [f"Sure: {spoken_in_the_square(BOXES['left'])}"]
    assert {metric: sample[metric] for metric in METRICS}[ACCURACY["square"]] == 1


@pytest.mark.slow
def test_the_shipped_task_gives_its_own_prompt_rows_and_verdict_on_local_files(world: Path) -> None:
    legacy = BENCHMARKS["legacy_refcocog_val"]
    shipped_yaml = f"{legacy.task_folder}/{legacy.task}.yaml"
    write_local_task(world / "tasks", shipped_yaml, legacy.name, legacy.data.split, world / "hub.parquet")
    asked, found = evaluate([legacy.name], world / "tasks")
    assert len(asked) == 6  # a row for each expression
    assert all("bounded between 0 and 1. Please provide" in text for text, _, _ in asked)
    assert found["results"][legacy.name][f"{legacy.headline},none"] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_lmms_evals_command_line_runs_the_tasks_from_the_root(world: Path) -> None:
    (world / "eval").symlink_to(ROOT / "eval")
    command = ["--model", "dummy", "--model_args", "response=nowhere", "--tasks", "rec_refcocog_val", "--include_path",
               "eval/lmms_tasks", "--batch_size", "1", "--output_path", "out"]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *command],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    files = list(Path("out").rglob("*_results.json"))
    assert len(files) == 1, result.stderr[-3000:]  # a failed run exits with 0
    scores = json.loads(files[0].read_text())["results"]["rec_refcocog_val"]
    assert (scores[f"{NOT_PARSED},none"], scores[f"{ACCURACY['square']},none"]) == (1, 0)
