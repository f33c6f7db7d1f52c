"""What a run is to do: which benchmarks are not finished, of which weights, from which files."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eval.adapter import ModelRequest, default_dtype
from eval.benchmarks import Benchmark, choose
from eval.checkpoint import identify, own_conversation, read_llava_config
from eval.finished import finished_run
from eval.hub_files import Lock
from eval.judge import read_judge
from eval.preflight import PreflightError, check_run
from eval.processes import processes_here
from eval.task_data import TaskData
from llava.mm_utils import get_model_name_from_path
from patch_aligned.results.run_file import RESULT_FILE, ModelIdentity, RunResult


@dataclass(frozen=True)
class Plan:
    """What a run is to do, decided by the first process for all of them.

    Attributes:
        model: whose answers.
        request: how to load it.
        output: folder of the runs.
        todo: benchmarks that are not finished, each with its files.
    """

    model: ModelIdentity
    request: ModelRequest
    output: Path
    todo: tuple[tuple[Benchmark, TaskData], ...]


def make_plan(arguments: argparse.Namespace, processes: int) -> Plan:
    """Checks everything that can be checked, and finds out what is left to do.

    Raises:
        PreflightError: lists what is in the way.
    """
    try:
        benchmarks = choose(arguments.benchmarks.split(","), filter(None, arguments.without.split(",")))
    except ValueError as error:
        raise PreflightError(str(error)) from error
    path = arguments.model_path.rstrip("/")
    folder_name = get_model_name_from_path(path)
    name = arguments.model_name or folder_name
    output = arguments.output or Path("runs", "eval", name)
    data = check_run(
        benchmarks,
        path,
        arguments.model_base,
        limit=arguments.limit,
        num_processes=processes_here(processes),
        num_gpus=torch.cuda.device_count(),
        needs_judge=any(
            benchmark.is_judged and (arguments.again or not (output / benchmark.name / RESULT_FILE).is_file())
            for benchmark in benchmarks
        ),
        lock=Lock(arguments.lock),
    )
    try:
        config = read_llava_config(path, arguments.model_base)
        _refuse_marks_around_images(path, config)
        model = identify(name, path, arguments.model_base)
    except (OSError, ValueError) as error:
        raise PreflightError(str(error)) from error
    conversation = own_conversation(path, config) if arguments.conversation == "auto" else arguments.conversation
    dtype = default_dtype() if arguments.dtype == "auto" else arguments.dtype
    request = ModelRequest(path, model.base, folder_name, conversation, dtype, arguments.batch_size)
    plan = Plan(model, request, output, ())
    todo = []
    for benchmark in benchmarks:
        if arguments.again:
            shutil.rmtree(plan.output / benchmark.name, ignore_errors=True)
        if not _is_finished(plan, benchmark, data[benchmark.name], arguments):
            todo.append((benchmark, data[benchmark.name]))
    return replace(plan, todo=tuple(todo))


def announcement(plan: Plan) -> str:
    """One line on what begins."""
    asked = plan.request
    names = ", ".join(benchmark.name for benchmark, _ in plan.todo)
    return f"{plan.model.name}: {names}; template {asked.conversation}, {asked.dtype}, batch size {asked.batch_size}"


def summary(result: RunResult, folder: Path) -> str:
    """One line on a run."""
    score = result.scores.get(result.headline or "")
    if score is not None:
        error = "" if score.stderr is None else f" ± {score.stderr:.4g}"
        said = f"{result.headline} {score.value:.4g}{error} over {score.rows} rows"
    else:
        said = f"{result.data.rows} rows answered"
    if result.submission:
        said += f", for a test server {folder / result.submission}"
    return f"{result.benchmark}: {said}, {folder / RESULT_FILE}"


def _refuse_marks_around_images(path: str, config: Any) -> None:
    """lmms-eval's adapter puts no marks around images, whatever a model was trained with."""
    if getattr(config, "mm_use_im_start_end", False):
        raise ValueError(
            f"{path}: its config has mm_use_im_start_end, so it was trained with marks around each image, and "
            "lmms-eval's adapter leaves them out; next: python -m llava.eval.model_vqa_loader, or eval.captions, which "
            "set them"
        )


def judge_of(benchmark: Benchmark) -> dict[str, Any] | None:
    """The judge that the environment names, as results hold it, or None where nothing is judged."""
    return read_judge().recorded() if benchmark.is_judged else None


def _is_finished(plan: Plan, benchmark: Benchmark, data: TaskData, arguments: argparse.Namespace) -> bool:
    """Whether a run is there with this model and these settings.

    Raises:
        PreflightError: one of another model or other settings is.
    """
    folder = plan.output / benchmark.name
    there = finished_run(
        folder,
        plan.model,
        plan.request.conversation,
        plan.request.dtype,
        arguments.max_new_tokens or benchmark.max_new_tokens,
        arguments.limit,
        lambda run: {
            "box frame": (run.settings.box_frame, arguments.box_frame if benchmark.speaks_boxes else None),
            "seed": (run.settings.seed, arguments.seed),
            "judge": (run.settings.judge, judge_of(benchmark)),
            "revision of the data": (run.data.revision, data.revision),
        },
    )
    if there is None:
        return False
    print(f"{summary(there, folder)} (finished before)")
    return True
