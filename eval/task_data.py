"""Where the rows of a benchmark come from on this machine, and what a task must be told to read them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import ROOT, TASK_FOLDERS, Benchmark, HubData, LocalData
from eval.hub_files import DataError, Lock, fetch
from eval.shipped_tasks import shipped_tasks_folder

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class TaskData:
    """Files of a benchmark, found.

    Attributes:
        source: name of the data set, or of the file.
        revision: commit on the hub, or `sha256:` and the hash of the file: another whenever the rows may be others.
        split: its name.
        paths: parquet files of the rows.
        pictures: parquet files of the pictures, where these are apart.
    """

    source: str
    revision: str
    split: str
    paths: tuple[Path, ...]
    pictures: tuple[Path, ...] = ()


def find_data(benchmark: Benchmark, lock: Lock) -> TaskData:
    """Finds the files of a benchmark, downloading those of the hub that are missing.

    Raises:
        DataError: they cannot be had; one sentence that says why and what to do next.
    """
    data = benchmark.data
    if isinstance(data, HubData):
        found = fetch(data, lock, benchmark.name)
        pictures = fetch(benchmark.pictures, lock, benchmark.name).paths if benchmark.pictures else ()
        return TaskData(data.repository, found.revision, data.split, found.paths, pictures)
    path = ROOT / data.path
    if not path.is_file():
        raise DataError(f"{benchmark.name}: no file {data.path}; next: {data.made_by}")
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return TaskData(data.path, f"sha256:{digest.hexdigest()}", data.split, (path,))


def task_folder(benchmark: Benchmark) -> Path:
    """The folder that holds the benchmark's task.

    Raises:
        ImportError: it is one of lmms-eval's, which is not installed.
    """
    within = TASK_FOLDERS if isinstance(benchmark.data, LocalData) else shipped_tasks_folder()
    return within / benchmark.task_folder


def task_config(benchmark: Benchmark, data: TaskData) -> dict[str, Any]:
    """What replaces a task's own keys, so that it reads exactly these files; nothing that is asked or scored."""
    config: dict[str, Any] = {
        "task": benchmark.task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {data.split: [str(path) for path in data.paths]}},
    }
    if data.pictures:
        # The shipped task copies a picture into each row, from a data set whose name and newest commit it hard-codes.
        config |= {"process_docs": None, "doc_to_visual": _picture_of(data.pictures)}
    return config


def _picture_of(paths: tuple[Path, ...]) -> Callable[[dict[str, Any]], list[Any]]:
    """Looks up GQA's picture of a row by `imageId`."""
    import datasets

    pictures = datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    row_of = {name: row for row, name in enumerate(pictures["id"])}

    def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
        return [pictures[row_of[doc["imageId"]]]["image"].convert("RGB")]

    return doc_to_visual
