"""Data sets of the hub at pinned commits, and what a task must be told to read their files.

A lock file holds the commit of each data set and the files of each split. Entries that it lacks are looked up once, at
the newest commit, and added. From then on the same files are read, with or without a network.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import ROOT, TASK_FOLDERS, Benchmark, HubData, LocalData
from patch_aligned.files import sha256_of, written_whole

LOCK = ROOT / "eval" / "revisions.json"
_HTTP_LIBRARIES = ("httpx", "httpx2", "requests")  # that huggingface_hub has used to reach the hub
_SHA256_DIGITS = 64


class DataError(ValueError):
    """Raised for data that is not available. The message says why and what to do next."""


class Lock:
    """The lock file: `{repository: {"revision": commit, "files": {"config/split": [names]}}}`."""

    def __init__(self, path: Path = LOCK) -> None:
        self.path = path
        self._sets: dict[str, Any] = self._read()

    def find(self, data: HubData) -> tuple[str | None, list[str] | None]:
        """The commit of a data set and the names of a split's files, as far as they are known."""
        entry = self._sets.get(data.repository, {})
        return entry.get("revision"), entry.get("files", {}).get(_split_name(data))

    def add(self, data: HubData, revision: str, files: list[str]) -> None:
        """Add a split, and keep what other runs have added meanwhile."""
        self._sets = self._read()
        entry = self._sets.setdefault(data.repository, {"revision": revision, "files": {}})
        entry["files"][_split_name(data)] = files
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as temporary:
            temporary.write_text(json.dumps(self._sets, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {}
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{self.path}: no JSON: {error}; next: delete it, and prefetch again") from error


def fetch(data: HubData, lock: Lock, benchmark: str) -> tuple[str, tuple[Path, ...]]:
    """Return commit and Parquet files of a split, downloading those that are missing. `benchmark` is for messages."""
    from huggingface_hub import hf_hub_download

    with _clear_messages(data, benchmark):
        revision, files = lock.find(data)
        if files is None:
            lock.add(data, *_look_up(data, revision, benchmark))
            revision, files = lock.find(data)
        assert revision is not None and files is not None
        # For a known commit, a file in the cache is used without asking the hub.
        paths = [Path(hf_hub_download(data.repository, name, repo_type="dataset", revision=revision)) for name in files]
    return revision, tuple(paths)


def count_rows(paths: Sequence[Path]) -> int:
    """Number of rows of some files, from their footers."""
    from pyarrow import parquet

    return sum(parquet.ParquetFile(path).metadata.num_rows for path in paths)


def verify(paths: Sequence[Path]) -> None:
    """Compare the SHA-256 of each file with the hub's, which is the name of the blob in the cache."""
    for path in paths:
        expected = path.resolve().name
        if len(expected) != _SHA256_DIGITS:
            continue  # small files are named by another hash
        if (found := sha256_of(path)) != expected:
            raise DataError(
                f"{path}: found SHA-256 {found}, expected {expected}; next: delete {path.resolve()}, and prefetch again"
            )


def _split_name(data: HubData) -> str:
    return f"{data.config or 'default'}/{data.split}"


def _look_up(data: HubData, revision: str | None, benchmark: str) -> tuple[str, list[str]]:
    """Ask the hub for the commit and file names of a split."""
    import datasets
    from huggingface_hub import HfApi

    commit = revision or HfApi().dataset_info(data.repository, timeout=30).sha
    assert commit is not None
    files = datasets.load_dataset_builder(data.repository, data.config, revision=commit).config.data_files
    if data.split not in files:
        raise DataError(
            f"{benchmark}: {data.repository} has no split {data.split!r}; there are {', '.join(map(str, files))}"
        )
    prefix = f"hf://datasets/{data.repository}@{commit}/"
    return commit, [name.removeprefix(prefix) for name in files[data.split]]


@contextmanager
def _clear_messages(data: HubData, benchmark: str) -> Iterator[None]:
    """Turn errors of the hub into a `DataError` of one sentence."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    page = f"https://huggingface.co/datasets/{data.repository}"
    try:
        yield
    except (RepositoryNotFoundError, DatasetNotFoundError) as error:
        if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):  # the words of `datasets`
            why, advice = "is gated", f"accept its terms at {page}, then `hf auth login`"
        else:
            why, advice = "is gone, or private and there is no token for it", f"look at {page}, and `hf auth login`"
        raise DataError(f"{benchmark}: {data.repository} {why}; next: {advice}") from error
    except Exception as error:
        is_offline = isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError | ConnectionError)
        if is_offline or type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES:
            raise DataError(
                f"{benchmark}: {data.repository} is not on this machine, and there is no network "
                f"({type(error).__name__}); next: where there is one, python -m eval.prefetch --benchmarks "
                f"{benchmark}, then take HF_HOME and the lock file along"
            ) from error
        if isinstance(error, HfHubHTTPError):
            first = str(error).splitlines()[0]
            raise DataError(f"{benchmark}: the hub refused {data.repository}: {first}") from error
        raise


def shipped_tasks_folder() -> Path:
    """Return the folder of the tasks that lmms-eval ships; `ImportError` if it is not installed."""
    spec = importlib.util.find_spec("lmms_eval")  # the package itself takes ten seconds to import
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("lmms-eval is not installed; next: pip install 'patch-aligned-llava[eval]'")
    return Path(spec.submodule_search_locations[0]) / "tasks"


@dataclass(frozen=True)
class TaskData:
    """The files of a benchmark on this machine."""

    source: str  # name of the data set, or of the file
    revision: str  # commit on the hub, or `sha256:` and the hash of the file: changes whenever rows may
    split: str
    paths: tuple[Path, ...]  # Parquet files of the rows
    pictures: tuple[Path, ...] = ()  # Parquet files of the pictures, if they are separate


def find_data(benchmark: Benchmark, lock: Lock) -> TaskData:
    """Find the files of a benchmark, downloading those of the hub that are missing; `DataError` says what to do."""
    data = benchmark.data
    if isinstance(data, HubData):
        revision, paths = fetch(data, lock, benchmark.name)
        pictures = fetch(benchmark.pictures, lock, benchmark.name)[1] if benchmark.pictures else ()
        return TaskData(data.repository, revision, data.split, paths, pictures)
    path = ROOT / data.path
    if not path.is_file():
        raise DataError(f"{benchmark.name}: no file {data.path}; next: {data.made_by}")
    return TaskData(data.path, f"sha256:{sha256_of(path)}", data.split, (path,))


def task_folder(benchmark: Benchmark) -> Path:
    """Return the folder of the benchmark's task. Raises `ImportError` if it is in lmms-eval and that is missing."""
    within = TASK_FOLDERS if isinstance(benchmark.data, LocalData) else shipped_tasks_folder()
    return within / benchmark.task_folder


def task_config(benchmark: Benchmark, data: TaskData) -> dict[str, Any]:
    """Return overrides with which a task reads exactly these files. They do not change prompts or scores."""
    config: dict[str, Any] = {
        "task": benchmark.task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {data.split: [str(path) for path in data.paths]}},
    }
    if data.pictures:
        # The shipped task copies a picture into each row, from the newest commit of a hard-coded data set.
        config |= {"process_docs": None, "doc_to_visual": _picture_of(data.pictures)}
    return config


def _picture_of(paths: tuple[Path, ...]) -> Callable[[dict[str, Any]], list[Any]]:
    """Look up GQA's picture of a row by `imageId`."""
    import datasets

    pictures = datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    row_of = {name: row for row, name in enumerate(pictures["id"])}

    def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
        return [pictures[row_of[doc["imageId"]]]["image"].convert("RGB")]

    return doc_to_visual
