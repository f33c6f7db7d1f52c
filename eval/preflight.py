"""What would end a run after an hour, found before it starts: each problem one sentence, with what to do next."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

from eval.benchmarks import Benchmark
from eval.hub_files import DataError, Lock
from eval.judge import check_judge, read_judge
from eval.task_data import TaskData, find_data
from llava.model.builder import whose_weights
from llava.model.tensor_files import Form, checkpoint_form, recorded_base


class PreflightError(ValueError):
    """Everything that is in the way of a run, a line each."""


def check_run(
    benchmarks: Iterable[Benchmark],
    model_path: str,
    model_base: str | None,
    *,
    limit: int | None,
    num_processes: int,
    num_gpus: int,
    needs_judge: bool,
    lock: Lock,
) -> dict[str, TaskData]:
    """Looks for all problems at once, and fetches the data.

    Returns:
        The files of each benchmark, by its name.

    Raises:
        PreflightError: lists what is in the way.
    """
    benchmarks = list(benchmarks)
    problems: list[str] = []
    data: dict[str, TaskData] = {}

    def collect(check: Callable[[], None]) -> None:
        try:
            check()
        except (ValueError, OSError, ImportError) as error:
            problems.append(str(error))

    collect(check_installed)
    collect(lambda: check_checkpoint(model_path, model_base))
    collect(lambda: check_processes(num_processes, num_gpus))
    collect(lambda: check_limit(benchmarks, limit))
    if needs_judge:
        collect(check_judge_of_environment)
    for benchmark in benchmarks:
        try:
            data[benchmark.name] = find_data(benchmark, lock)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise PreflightError("\n".join(problems))
    return data


def check_installed() -> None:
    """Raises ImportError where lmms-eval is not installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ImportError("lmms-eval is not installed; next: pip install -e '.[eval]'")


def check_checkpoint(path: str, base: str | None) -> None:
    """Raises FileNotFoundError or ValueError where a checkpoint is not one, or lacks its base or has no use for one."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path}: no such folder; next: hf download {path} --local-dir checkpoints/{folder.name}, if that is its "
            "name on the hub"
        )
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{path}: found no config.json, expected a checkpoint; does it lie in a subfolder?")
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise FileNotFoundError(f"{path}: found a config and no weights (*.safetensors or *.bin): was it copied whole?")
    form = checkpoint_form(path)
    if form is not Form.WHOLE_MODEL and base is None:
        held = "a projector" if form is Form.PROJECTOR else "an adapter"
        raise ValueError(f"{path}: holds {held} alone; next: --model-base LLM{recorded_base(path)}")
    if form is Form.WHOLE_MODEL and base is not None:
        raise ValueError(f"{path}: holds a whole model, which --model-base {base} is no part of; next: leave it out")
    whose_weights(form, path, base)


def check_processes(num_processes: int, num_gpus: int) -> None:
    """Raises ValueError where there are more processes than GPUs: the adapter gives each its own."""
    if num_processes > max(1, num_gpus):
        raise ValueError(
            f"{num_processes} processes and {num_gpus} GPUs: each process needs one of its own; next: "
            f"NUM_GPUS={max(1, num_gpus)} for the scripts, --num_processes for accelerate"
        )


def check_limit(benchmarks: Iterable[Benchmark], limit: int | None) -> None:
    """Raises ValueError where rows that belong together would be parted."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit: found {limit}, expected a number of rows from 1")
    for benchmark in benchmarks:
        step = benchmark.limit_step
        if limit is not None and limit % step:
            raise ValueError(
                f"--limit: found {limit}, expected a multiple of {step}, as the rows of {benchmark.name} belong "
                f"together in groups of {step}; next: --limit {limit + step - limit % step}"
            )


def check_judge_of_environment() -> None:
    """Raises JudgeError where the judge that the environment names does not answer."""
    check_judge(read_judge())
