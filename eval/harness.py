"""One task of lmms-eval on a loaded adapter, in this process or in all of several."""

from __future__ import annotations

import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import Benchmark
from eval.judge import end_without_mark
from eval.task_data import TaskData, task_config, task_folder

SUBMISSIONS = "submissions"


@dataclass(frozen=True)
class Evaluated:
    """What lmms-eval made of a task.

    Attributes:
        scores: number of each metric; None or NaN where there is none.
        rows: as it logs them, sorted by `doc_id`.
        aggregations: function of each metric, from what rows say to the number.
    """

    scores: dict[str, Any]
    rows: list[dict[str, Any]]
    aggregations: dict[str, Any]


def evaluate_task(
    adapter: Any,
    benchmark: Benchmark,
    data: TaskData,
    folder: Path,
    *,
    max_new_tokens: int,
    limit: int | None,
    seed: int,
) -> Evaluated | None:
    """Asks and scores all rows of a benchmark, greedily.

    Args:
        adapter: a model of lmms-eval, loaded.
        benchmark: what to ask.
        data: its files.
        folder: of the run; submission files go below it.
        max_new_tokens: of an answer.
        limit: at most so many rows.
        seed: of scorers that draw answers which they cannot read.

    Returns:
        None in all processes but the first.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager, get_task_dict
    from tenacity import RetryError

    shutil.rmtree(folder / SUBMISSIONS, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    manager = TaskManager(include_path=str(task_folder(benchmark)), include_defaults=False, model_name="llava")
    try:
        task = get_task_dict([task_config(benchmark, data)], manager)[benchmark.task]
        # MMVet's own file asks for a temperature of 0.2, which the adapter takes for sampling.
        generation = {"temperature": 0, "max_new_tokens": max_new_tokens}
        task.set_config(key="generation_kwargs", value=generation, update=True)
        if benchmark.is_judged:
            end_without_mark(task.config.process_results)
        found = simple_evaluate(
            model=adapter,
            tasks=[task],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            process_docs_parallel=1,  # CMMMU's scorer draws: rows in threads would draw in any order
            cli_args=Namespace(output_path=str(folder), process_with_media=True),
        )
    except RetryError as error:  # lmms-eval tries five times whatever goes wrong, and wraps it
        cause = error.last_attempt.exception()
        assert cause is not None
        raise cause from None
    if found is None:
        return None
    numbers = found["results"][benchmark.task]
    metrics = [key for key in numbers if key.endswith(",none") and "_stderr" not in key]
    return Evaluated(
        scores={key.removesuffix(",none"): numbers[key] for key in metrics},
        rows=sorted(found["samples"][benchmark.task], key=lambda row: row["doc_id"]),
        aggregations=task.aggregation(),
    )
