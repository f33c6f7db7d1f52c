"""`two_processes.py TASKS TABLE FLAGS`: runs `eval.run` as one of several processes, with an adapter without GPU."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms

import eval.plan
import eval.run
from eval.adapter import AnswerLog
from eval.benchmarks import BENCHMARKS, Benchmark, LocalData


class EchoingAdapter(lmms):
    """Answers with the question, and counts its requests on the way."""

    def __init__(self, _: Any) -> None:
        super().__init__()
        self.accelerator = Accelerator(cpu=True)
        self.device = torch.device("cpu")
        self.log: AnswerLog | None = None
        self.first_prompt = ""

    def generate_until(self, requests: list[Any]) -> list[str]:
        assert self.log is not None
        self.first_prompt = min(requests, key=lambda request: request.args[3]).args[0]
        return self.log.answer(requests, lambda asked: [request.args[0] for request in asked], id, 2)

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> Any:
        raise NotImplementedError

    def clean(self) -> None:
        pass

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


if __name__ == "__main__":
    _, task_folder, table, *flags = sys.argv
    data = LocalData(table, "test", "make it")
    BENCHMARKS["pictures"] = Benchmark(
        "pictures", "pictures", "mini", task_folder, data, "has_an_e", tables=(6,), column="Pictures", max_new_tokens=8
    )
    eval.run.load_adapter = EchoingAdapter  # type: ignore[assignment]
    eval.plan.check_processes = lambda *_: None  # it asks for a GPU each
    sys.exit(eval.run.main(flags))
