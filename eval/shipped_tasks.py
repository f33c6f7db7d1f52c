"""lmms-eval's own tasks over local files: prompts, parsers and scores as shipped, only the rows come from elsewhere.

A shipped task names a data set of the hub. A generated YAML includes the shipped one by its path inside the installed
package and overrides what says where the rows are, so that no scorer is rewritten and none drifts from the original.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def shipped_tasks_folder() -> Path:
    """The folder of the tasks that lmms-eval ships.

    Raises:
        ImportError: lmms-eval is not installed.
    """
    spec = importlib.util.find_spec("lmms_eval")  # the package itself takes ten seconds to import
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("lmms-eval is not installed; install it by: pip install 'patch-aligned-llava[eval]'")
    return Path(spec.submodule_search_locations[0]) / "tasks"


def write_local_task(
    folder: str | Path, shipped_yaml: str, task: str, data_files: Mapping[str, str | Path], **overrides: Any
) -> Path:
    """Writes `<folder>/<task>.yaml`: a shipped task over local Parquet files. Give the folder as `include_path`.

    Args:
        folder: made where it does not exist.
        shipped_yaml: the shipped task's file below lmms-eval's `tasks`, like `mme/mme.yaml`.
        task: name of the new task; not that of the shipped one.
        data_files: split -> Parquet file with the columns of the hub's data set. A task asks for its own `test_split`.
        overrides: further keys of the task, like `process_docs=None` where the shipped function needs the hub.

    Raises:
        ImportError: lmms-eval is not installed.
        FileNotFoundError: no such shipped task, or no such Parquet file.
    """
    tasks = shipped_tasks_folder()
    source = tasks / shipped_yaml
    if not source.is_file():
        near = ", ".join(sorted(path.name for path in source.parent.glob("*.yaml"))) or "no task"
        raise FileNotFoundError(f"lmms-eval ships no {shipped_yaml} in {tasks}; beside it are: {near}")
    files = {split: Path(file).resolve() for split, file in data_files.items()}
    for split, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"task {task}, split {split}: found no file {file}, expected its rows as Parquet")
    config = {
        "include": str(source),
        "task": task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        **overrides,
    }
    target = Path(folder) / f"{task}.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return target
