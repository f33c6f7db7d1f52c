"""Run one task of lmms-eval on a loaded adapter, and convert its results to scores and samples of a run."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import Benchmark
from eval.hub import TaskData, task_config, task_folder
from eval.judge import end_without_mark
from patch_aligned.results.run import IMAGE_FRAME, PADDED_FRAME, Sample, Score

SUBMISSIONS = "submissions"


@dataclass(frozen=True)
class Evaluated:
    """lmms-eval's results of a task."""

    scores: dict[str, Any]  # by metric; may be None or NaN
    rows: list[dict[str, Any]]  # as it logs them, sorted by `doc_id`
    aggregations: dict[str, Any]  # by metric: the function from the rows' values to the score


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
    """Ask and score the rows of a benchmark with greedy decoding. Submission files are written below `folder`.

    `seed` is for scorers that draw an answer if they cannot parse the model's. Returns None in all processes but the
    first.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager, get_task_dict
    from tenacity import RetryError

    shutil.rmtree(folder / SUBMISSIONS, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    manager = TaskManager(include_path=str(task_folder(benchmark)), include_defaults=False, model_name="llava")
    try:
        task = get_task_dict([task_config(benchmark, data)], manager)[benchmark.task]
        # MMVet's own file asks for a temperature of 0.2, at which the adapter samples.
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
            process_docs_parallel=1,  # CMMMU's scorer draws: threads would draw in any order
            cli_args=Namespace(output_path=str(folder), process_with_media=True),
        )
    except RetryError as error:  # lmms-eval tries five times on any error, and wraps it
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


# lmms-eval's results as scores and samples of a run.

ID_COLUMNS = ("question_id", "questionId", "id", "index", "image_id")
# The miniature's, POPE's, GQA's, SEED's, TextVQA's, RefCOCO's, and that of lmms-eval's RefCOCO.
IMAGE_COLUMNS = ("scene", "image_source", "imageId", "data_id", "image_id", "image", "file_name")
_OBJECT_IN_FILE_NAME = re.compile(r"(?<=_\d{12})_\d+(?=\.jpg$)")  # RefCOCO names files by picture and object
_ROUNDING = 5e-4  # MMMU's share comes rounded, to three digits or five


class UnscoredError(RuntimeError):
    """Raised for rows that the judge did not score, which lmms-eval counts as wrong."""


def headline_of(benchmark: Benchmark, box_frame: str) -> str | None:
    """The metric that tables show; for boxes, in the frame they are read in."""
    if benchmark.headline == PADDED_FRAME and box_frame == "image":
        return IMAGE_FRAME
    return benchmark.headline


def scores_and_samples(
    benchmark: Benchmark, evaluated: Evaluated
) -> tuple[dict[str, Score], dict[str, str], list[Sample]]:
    """Return scores with standard errors, reasons for missing metrics, and the rows.

    A standard error is given if the score is a mean over rows; rows of different images count as independent.
    """
    rows = evaluated.rows
    _refuse_unscored(benchmark, rows)
    images = [image_of(row["doc"]) for row in rows]
    scores, missing = {}, {}
    by_row: list[dict[str, float]] = [{} for _ in rows]
    for metric, value in evaluated.scores.items():
        if metric == "submission":
            continue
        having = [number for number, row in enumerate(rows) if metric in row]
        if not isinstance(value, int | float) or not math.isfinite(value):
            missing[metric] = f"no number: lmms-eval gave {value!r} for {len(having)} rows"
            continue
        numbers = _numbers_of_rows(benchmark, metric, [rows[number][metric] for number in having], evaluated)
        stderr = None
        if numbers and abs(statistics.fmean(numbers) - value) <= _ROUNDING:
            for row, of_row in zip(having, numbers, strict=True):
                by_row[row][metric] = of_row
            stderr = standard_error(numbers, [images[number] for number in having])
        scores[metric] = Score(float(value), stderr, len(having), benchmark.unit)
    if benchmark.headline is not None and benchmark.headline not in scores:
        missing.setdefault(benchmark.headline, "no number: no row has one")
    samples = [
        Sample(row_id, row["arguments"][0], _text(row["resps"]), _plain(row["target"]), numbers, image)
        for row_id, row, numbers, image in zip(row_ids(rows), rows, by_row, images, strict=True)
    ]
    return scores, missing, samples


def row_ids(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ids of the rows: a column without duplicates, or else their numbers."""
    for column in ID_COLUMNS:
        ids = [str(row["doc"].get(column, "")) for row in rows]
        if all(ids) and len(set(ids)) == len(ids):
            return ids
    return [str(row["doc_id"]) for row in rows]


def image_of(document: dict[str, Any]) -> str | None:
    """The name of a row's image, if a column has it. Rows of one image are resampled together."""
    named = (document.get(column) for column in IMAGE_COLUMNS)  # a column may hold the picture itself
    name = next((str(name) for name in named if isinstance(name, str | int) and name != ""), None)
    return name and _OBJECT_IN_FILE_NAME.sub("", name)


def standard_error(numbers: Sequence[float], images: Sequence[str | None]) -> float | None:
    """Standard error of the mean of rows, clustered by image; None with a single image.

    With one row per image it is the sample's standard deviation over the root of the count. With several, the
    deviations of an image are added before they are squared. A row without an image is a cluster of its own.
    """
    mean = statistics.fmean(numbers)
    deviations: dict[Any, float] = {}
    for row, (number, image) in enumerate(zip(numbers, images, strict=True)):
        key = row if image is None else image
        deviations[key] = deviations.get(key, 0.0) + number - mean
    count = len(deviations)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * sum(d * d for d in deviations.values())) / len(numbers)


def find_submission(benchmark: Benchmark, folder: Path) -> str | None:
    """The file for a test server, relative to the run's folder."""
    found = sorted(folder.glob(benchmark.submission)) if benchmark.submission else []
    return found[-1].relative_to(folder).as_posix() if found else None


def _numbers_of_rows(
    benchmark: Benchmark, metric: str, items: Sequence[Any], evaluated: Evaluated
) -> list[float] | None:
    """The score of each row alone, or None if it is not defined."""
    if all(isinstance(item, int | float) for item in items):
        return [float(item) for item in items]
    if benchmark.is_judged:  # MM-Vet's marks, from 0 to 1
        return [100.0 * item["score"] for item in items]
    if benchmark.mean_of_rows:
        with contextlib.redirect_stdout(io.StringIO()):  # scorers print
            return [float(evaluated.aggregations[metric]([item])) for item in items]
    return None


def _refuse_unscored(benchmark: Benchmark, rows: Sequence[dict[str, Any]]) -> None:
    if not benchmark.is_judged or benchmark.headline is None:
        return
    unscored = [row for row in rows if not row[benchmark.headline]["eval_model"]]
    if unscored:
        raise UnscoredError(
            f"{benchmark.name}: the judge did not score {len(unscored)} of {len(rows)} rows, which lmms-eval counts as "
            "wrong; next: the same command again, the model's answers are kept"
        )


def _text(answers: Any) -> str:
    while isinstance(answers, list):
        answers = answers[0]
    return answers


def _plain(target: Any) -> Any:
    """Convert to JSON values. NaN, the answer of rows in a split without answers, becomes text."""
    return json.loads(json.dumps(target, default=str), parse_constant=str)
