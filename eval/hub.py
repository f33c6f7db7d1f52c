"""Data sets of the hub, pinned: which commit, which files, and where these lie on this machine.

A lock file holds the commit of each data set and the files of each split. What it does not hold is looked up once, at
the newest commit, and written into it. From then on the same files are read, with a network or without.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import ROOT, TASK_FOLDERS, Benchmark, HubData, LocalData
from patch_aligned.files import written_whole

LOCK = ROOT / "eval" / "revisions.json"
_BLOCK_BYTES = 1 << 22


class DataError(ValueError):
    """Data that cannot be had; the message says why and what to do next."""


@dataclass(frozen=True)
class HubFiles:
    """Files of a split, on this machine.

    Attributes:
        revision: the commit they are of.
        paths: parquet files in the order of their rows.
    """

    revision: str
    paths: tuple[Path, ...]


class Lock:
    """The lock file: `{repository: {"revision": commit, "files": {"config/split": [names]}}}`."""

    def __init__(self, path: Path = LOCK) -> None:
        self.path = path
        self._sets: dict[str, Any] = self._read()

    def revision(self, data: HubData) -> str | None:
        """The commit of a data set, where it is known."""
        return self._sets.get(data.repository, {}).get("revision")

    def files(self, data: HubData) -> list[str] | None:
        """Names of a split's files, where they are known."""
        return self._sets.get(data.repository, {}).get("files", {}).get(_split_name(data))

    def add(self, data: HubData, revision: str, files: list[str]) -> None:
        """Writes down what a split is, beside what other runs have written down meanwhile."""
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


def fetch(data: HubData, lock: Lock, benchmark: str) -> HubFiles:
    """The files of a split: those on this machine, or else downloaded.

    Args:
        data: the split.
        lock: knows the commit, or learns it.
        benchmark: for messages.

    Raises:
        DataError: there is no network and nothing on this machine, or the data set is gated, gone or has no such
            split.
    """
    from huggingface_hub import hf_hub_download

    with _clear_messages(data, benchmark):
        if lock.files(data) is None:
            lock.add(data, *_look_up(data, lock.revision(data), benchmark))
        revision, files = lock.revision(data), lock.files(data)
        assert revision is not None
        assert files is not None
        # A file of a known commit that lies here is taken without asking the hub.
        paths = [Path(hf_hub_download(data.repository, name, repo_type="dataset", revision=revision)) for name in files]
    return HubFiles(revision, tuple(paths))


def count_rows(files: HubFiles) -> int:
    """Rows of some files, from their footers."""
    from pyarrow import parquet

    return sum(parquet.ParquetFile(path).metadata.num_rows for path in files.paths)


def verify(files: HubFiles) -> None:
    """Reads each file and compares its SHA-256 with the hub's, which is the name of the blob that the cache keeps.

    Raises:
        DataError: a file is not what the hub says it is.
    """
    for path in files.paths:
        expected = path.resolve().name
        if len(expected) != hashlib.sha256().digest_size * 2:
            continue  # small files are named by another hash
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise DataError(
                f"{path}: found SHA-256 {digest.hexdigest()}, expected {expected}; next: delete {path.resolve()}, and "
                "prefetch again"
            )


def _split_name(data: HubData) -> str:
    return f"{data.config or 'default'}/{data.split}"


def _look_up(data: HubData, revision: str | None, benchmark: str) -> tuple[str, list[str]]:
    """Commit and file names of a split, as the hub has them."""
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
    """Says in one sentence why the hub did not give what was asked for."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    no_network: tuple[type[Exception], ...] = (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError)
    no_network += _transport_errors()
    page = f"https://huggingface.co/datasets/{data.repository}"
    try:
        yield
    except (RepositoryNotFoundError, DatasetNotFoundError) as error:
        if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):  # the words of `datasets`
            why, advice = "is gated", f"accept its terms at {page}, then `hf auth login`"
        else:
            why, advice = "is gone, or private and there is no token for it", f"look at {page}, and `hf auth login`"
        raise DataError(f"{benchmark}: {data.repository} {why}; next: {advice}") from error
    except no_network as error:
        raise DataError(
            f"{benchmark}: {data.repository} is not on this machine, and there is no network "
            f"({type(error).__name__}); next: where there is one, python -m eval.prefetch --benchmarks {benchmark}, "
            "then take HF_HOME and the lock file along"
        ) from error
    except HfHubHTTPError as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{benchmark}: the hub refused {data.repository}: {first}") from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """Errors of the libraries that huggingface_hub has used to reach the hub, of those that are installed."""
    errors = []
    for name in ("httpx", "httpx2"):
        if importlib.util.find_spec(name):
            errors.append(importlib.import_module(name).TransportError)
    if importlib.util.find_spec("requests"):
        errors.append(importlib.import_module("requests").ConnectionError)
    return tuple(errors)


# Where the tasks lie that lmms-eval ships.


def shipped_tasks_folder() -> Path:
    """The folder of the tasks that lmms-eval ships.

    Raises:
        ImportError: lmms-eval is not installed.
    """
    spec = importlib.util.find_spec("lmms_eval")  # the package itself takes ten seconds to import
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("lmms-eval is not installed; install it by: pip install 'patch-aligned-llava[eval]'")
    return Path(spec.submodule_search_locations[0]) / "tasks"


# Where the rows of a benchmark come from on this machine, and what a task must be told to read them.


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
