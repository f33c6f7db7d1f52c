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
from eval.finished import finished_run
from eval.hub_files import Lock
from eval.judge import read_judge
from eval.preflight import PreflightError, check_run
from eval.processes import processes_here
from eval.task_data import TaskData
from llava.conversation import conversation_mode
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import read_config
from patch_aligned.checkpoint_hash import checkpoint_hash
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
    data = check_run(
        benchmarks,
        path,
        arguments.model_base,
        limit=arguments.limit,
        num_processes=processes_here(processes),
        num_gpus=torch.cuda.device_count(),
        lock=Lock(arguments.lock),
    )
    folder_name = get_model_name_from_path(path)
    try:
        config = _read_llava_config(path, arguments.model_base)
        model = identify(arguments.model_name or folder_name, path, arguments.model_base)
    except (OSError, ValueError) as error:
        raise PreflightError(str(error)) from error
    # What tables call a checkpoint must not change how it is talked to.
    own = conversation_mode(folder_name, config)
    conversation = own if arguments.conversation == "auto" else arguments.conversation
    dtype = default_dtype() if arguments.dtype == "auto" else arguments.dtype
    request = ModelRequest(path, model.base, folder_name, conversation, dtype, arguments.batch_size)
    plan = Plan(model, request, arguments.output or Path("runs", "eval", model.name), ())
    todo = []
    for benchmark in benchmarks:
        if arguments.again:
            shutil.rmtree(plan.output / benchmark.name, ignore_errors=True)
        if not _is_finished(plan, benchmark, data[benchmark.name], arguments):
            todo.append((benchmark, data[benchmark.name]))
    return replace(plan, todo=tuple(todo))


def identify(name: str, path: str, base: str | None) -> ModelIdentity:
    """Whose answers they are, by the content of the files; of a base that is a name on the hub, by its name.

    Raises:
        FileNotFoundError: a folder has no weights.
    """
    base_sha256 = checkpoint_hash(base).sha256 if base is not None and Path(base).exists() else None
    return ModelIdentity(name, path, checkpoint_hash(path).sha256, base, base_sha256)


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


def _read_llava_config(path: str, base: str | None) -> Any:
    has_config = (Path(path) / "config.json").is_file()  # adapters that peft alone has written have none
    config = read_config(path if has_config or base is None else base)
    if not getattr(config, "mm_vision_tower", None):
        raise ValueError(f"{path}: its config names no vision tower; expected a LLaVA, as benchmarks show pictures")
    return config


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
