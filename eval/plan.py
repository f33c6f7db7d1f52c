"""Plan a run: check what it needs before it starts, and find the benchmarks that are not finished."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from eval.adapter import ModelRequest, PreflightError, default_dtype, processes_here
from eval.benchmarks import Benchmark, choose
from eval.hub import Lock, TaskData, find_data, shipped_tasks_folder
from eval.judge import check_judge, read_judge
from llava.checkpoint_files import Form, checkpoint_form, recorded_base, whose_weights
from llava.command import read_record
from llava.conversation import conversation_mode
from llava.mm_utils import get_model_name_from_path
from patch_aligned.files import checkpoint_sha256
from patch_aligned.results.run import RESULT_FILE, ModelIdentity, RunResult, read_run


def check_run(
    benchmarks: Sequence[Benchmark],
    model_path: str,
    model_base: str | None,
    *,
    limit: int | None,
    num_processes: int,
    num_gpus: int,
    needs_judge: bool,
    lock: Lock,
) -> dict[str, TaskData]:
    """Check everything that would end a run later, and download the data. Returns the files of each benchmark.

    `PreflightError` lists all problems, a line each.
    """
    data: dict[str, TaskData] = {}

    def get_data(benchmark: Benchmark) -> None:
        data[benchmark.name] = find_data(benchmark, lock)

    checks: list[Callable[[], object]] = [
        shipped_tasks_folder,  # whether lmms-eval is installed
        partial(check_checkpoint, model_path, model_base),
        partial(check_processes, num_processes, num_gpus),
        partial(check_limit, benchmarks, limit),
        *([check_judge_of_environment] if needs_judge else []),
        *(partial(get_data, benchmark) for benchmark in benchmarks),
    ]
    problems = []
    for check in checks:
        try:
            check()
        except (ValueError, OSError, ImportError) as error:
            problems.append(str(error))
    if problems:
        raise PreflightError("\n".join(problems))
    return data


def check_checkpoint(path: str, base: str | None) -> None:
    """Raise `OSError` or `ValueError` if files or the base of a checkpoint are missing, or it needs no base."""
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
    """Raise `ValueError` for more processes than GPUs: the adapter gives each process its own."""
    if num_processes > max(1, num_gpus):
        raise ValueError(
            f"{num_processes} processes and {num_gpus} GPUs: each process needs one of its own; next: "
            f"NUM_GPUS={max(1, num_gpus)} for the scripts, --num_processes for accelerate"
        )


def check_limit(benchmarks: Iterable[Benchmark], limit: int | None) -> None:
    """Raise `ValueError` for a limit that separates rows which belong together."""
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
    """Raise `ValueError` if the judge that the environment names does not answer."""
    check_judge(read_judge())


def finished_run(folder: Path, wanted: Mapping[str, Any]) -> RunResult | None:
    """Return the run in a folder, or None if there is none; `PreflightError` if it is not the one that is wanted.

    `wanted` are the values that it must have, by attribute of its result, such as `settings.limit`.
    """
    if not (folder / RESULT_FILE).is_file():
        return None
    there = read_run(folder)
    for name, value in wanted.items():
        if (found := attrgetter(name)(there)) != value:
            raise PreflightError(
                f"{folder}: holds a run with another {name}: found {found!r}, asked for {value!r}; next: another "
                "--output, or --again to replace it"
            )
    return there


def identify(name: str, path: str, base: str | None) -> ModelIdentity:
    """Identify a model by the content of its files, and a base that is a name on the hub by its name."""
    base_sha256 = checkpoint_sha256(base) if base is not None and Path(base).exists() else None
    return ModelIdentity(name, path, checkpoint_sha256(path), base, base_sha256)


def training_of(path: str) -> dict[str, Any]:
    """Steps, seed and data of a checkpoint's training, as far as they are recorded in its folder."""
    folder = Path(path)
    record = read_record(folder.parent if folder.name.startswith("checkpoint-") else folder)
    state = folder / "trainer_state.json"
    found = {
        "steps": json.loads(state.read_text(encoding="utf-8"))["global_step"] if state.is_file() else None,
        "seed": record.get("flags", {}).get("seed"),
        "data (SHA-256)": record.get("sha256", {}).get("data_path"),
    }
    return {fact: value for fact, value in found.items() if value is not None}


def read_llava_config(path: str, base: str | None) -> Any:
    """Return the config of a checkpoint, or of its base if it has none; `ValueError` if it is not of a LLaVA."""
    from llava.model.builder import read_config

    has_config = (Path(path) / "config.json").is_file()  # adapters that peft alone has written have none
    config = read_config(path if has_config or base is None else base)
    if not getattr(config, "mm_vision_tower", None):
        raise ValueError(f"{path}: its config names no vision tower; expected a LLaVA, as benchmarks show pictures")
    return config


@dataclass(frozen=True)
class Plan:
    """What a run does, decided by the first process for all of them."""

    model: ModelIdentity
    request: ModelRequest  # how to load it
    output: Path  # folder of the runs
    todo: tuple[tuple[Benchmark, TaskData], ...]  # benchmarks that are not finished, with their files


def make_plan(arguments: argparse.Namespace, processes: int) -> Plan:
    """Check everything that can be checked, and find the benchmarks that are not finished."""
    import torch

    benchmarks = choose(arguments.benchmarks.split(","), filter(None, arguments.without.split(",")))
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
    config = read_llava_config(path, arguments.model_base)
    _refuse_marks_around_images(path, config)
    model = identify(name, path, arguments.model_base)
    is_own = arguments.conversation == "auto"
    conversation = conversation_mode(folder_name, config) if is_own else arguments.conversation
    dtype = default_dtype() if arguments.dtype == "auto" else arguments.dtype
    request = ModelRequest(path, model.base, folder_name, conversation, dtype, arguments.batch_size)
    todo = []
    for benchmark in benchmarks:
        folder = output / benchmark.name
        if arguments.again:
            shutil.rmtree(folder, ignore_errors=True)
        wanted = {
            "model.weights": model.weights,
            "settings.conversation": conversation,
            "settings.dtype": dtype,
            "settings.max_new_tokens": arguments.max_new_tokens or benchmark.max_new_tokens,
            "settings.limit": arguments.limit,
            "settings.box_frame": arguments.box_frame if benchmark.speaks_boxes else None,
            "settings.seed": arguments.seed,
            "settings.judge": judge_of(benchmark),
            "data.revision": data[benchmark.name].revision,
        }
        if there := finished_run(folder, wanted):
            print(f"{summary(there, folder)} (finished before)")
        else:
            todo.append((benchmark, data[benchmark.name]))
    return Plan(model, request, output, tuple(todo))


def announcement(plan: Plan) -> str:
    """One line about what starts."""
    asked = plan.request
    names = ", ".join(benchmark.name for benchmark, _ in plan.todo)
    return f"{plan.model.name}: {names}; template {asked.conversation}, {asked.dtype}, batch size {asked.batch_size}"


def summary(result: RunResult, folder: Path) -> str:
    """One line about a finished run."""
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
    """lmms-eval's adapter sets no marks around images, even if a model was trained with them."""
    if getattr(config, "mm_use_im_start_end", False):
        raise PreflightError(
            f"{path}: its config has mm_use_im_start_end, so it was trained with marks around each image, and "
            "lmms-eval's adapter leaves them out; next: python -m llava.eval.model_vqa_loader, or eval.captions, which "
            "set them"
        )


def judge_of(benchmark: Benchmark) -> dict[str, Any] | None:
    """The judge that the environment names, as results record it, or None if nothing is judged."""
    return asdict(read_judge()) if benchmark.is_judged else None
