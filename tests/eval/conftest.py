"""lmms-eval in the test's own process: its tasks over local files, and models that answer them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.hub import shipped_tasks_folder


@pytest.fixture
def run_task(tmp_path: Path) -> Callable[[Any, str, Path], Any]:
    """Runs a task of a folder on a model in this process; returns what lmms-eval makes of it."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    def run(model: Any, task: str, folder: Path) -> Any:
        return simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False, model_name="llava"),
            cli_args=Namespace(output_path=str(tmp_path / "out"), process_with_media=True),
        )

    return run


@pytest.fixture
def texts_of_batches(run_task: Callable[[Any, str, Path], Any]) -> Callable[..., dict[int, dict[str, list[str]]]]:
    """What the tiny checkpoint says to tasks of a folder, in batches of 1 and of 8: texts by size and task."""

    def answer(adapter: type, tasks: Iterable[str], folder: Path) -> dict[int, dict[str, list[str]]]:
        texts: dict[int, dict[str, list[str]]] = {1: {}, 8: {}}
        for size, found in texts.items():
            model = adapter(pretrained="tiny-llava", device_map="auto", device="cpu", batch_size=size)
            model.clean = lambda: None  # lmms-eval has the adapter throw the model away after each task
            for task in tasks:
                rows = run_task(model, task, folder)["samples"][task]
                found[task] = [row["resps"][0][0] for row in sorted(rows, key=lambda row: row["doc_id"])]
        return texts

    return answer


def write_picture_task(folder: Path, name: str, table: Path, metric: str, generation: dict[str, Any]) -> None:
    """Writes a task of lmms-eval that asks about pictures of a Parquet file; `utils.py` goes beside it."""
    task = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(table)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "question",
        "generation_kwargs": generation,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }
    functions = ("doc_to_visual", "doc_to_text", "process_results")
    lines = [yaml.safe_dump(task), *(f"{function}: !function utils.{function}\n" for function in functions)]
    (folder / f"{name}.yaml").write_text("".join(lines))


def write_local_task(folder: Path, shipped_yaml: str, task: str, split: str, rows: Path, **overrides: Any) -> None:
    """Writes the YAML of a shipped task over a local Parquet file: prompts, parsers and scores stay as shipped."""
    config = {
        "include": str(shipped_tasks_folder() / shipped_yaml),
        "task": task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(rows)}},
        **overrides,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.fixture
def listed_model() -> Any:
    """A model of lmms-eval that gives the texts of its list `answers`, row by row, and keeps what it was `asked`."""
    from lmms_eval.api.model import lmms

    class Listed(lmms):
        answers: list[str]
        asked: list[str]

        def generate_until(self, requests: list[Any]) -> list[str]:
            self.asked = [request.args[0] for request in requests]
            return [self.answers[request.args[3]] for request in requests]

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    return Listed()
