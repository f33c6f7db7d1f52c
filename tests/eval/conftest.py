"""`eval` and `playground` are not installed; their tests import them from the repository root."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


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
