"""The models' files: where they are published, and bringing them here or saying what to put where.

RAM's files are pinned by their hashes, the tag list and its thresholds by the commit as well. The default Grounding
DINO and SAM are pinned by their commits; others are taken at the revision that is given, or at what `main` is now. The
commit is written down, and every annotation run records it with the hashes of the files that it read.
"""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from patch_aligned.files import sha256_of, written_whole

_logger = logging.getLogger(__name__)

_CHECKPOINT_FILES = ("*.json", "*.txt", "*.safetensors")
_TAG_DATA = (
    "https://raw.githubusercontent.com/xinyu1205/recognize-anything/7cb804a8609e9f4b1a50b7f31436d2df40bb9481/ram/data/"
)
_UNREACHABLE = (OSError, ValueError, HfHubHTTPError)
_TIMEOUT_SECONDS = 60
_FETCHED = "fetched.json"


@dataclass(frozen=True)
class PinnedFile:
    """One published file.

    Attributes:
        name: what it is called here too.
        url: where it is published.
        sha256: of its content.
        repository: on the hub, None for a file from elsewhere.
    """

    name: str
    url: str
    sha256: str
    repository: str | None = None


def _on_hub(name: str, repository: str, sha256: str) -> PinnedFile:
    return PinnedFile(name, f"https://huggingface.co/{repository}/resolve/main/{name}", sha256, repository)


RAM_WEIGHTS = {
    "ram": _on_hub(
        "ram_swin_large_14m.pth",
        "xinyu1205/recognize_anything_model",
        "15c729c793af28b9d107c69f85836a1356d76ea830d4714699fb62e55fcc08ed",
    ),
    "ram_plus": _on_hub(
        "ram_plus_swin_large_14m.pth",
        "xinyu1205/recognize-anything-plus-model",
        "497c178836ba66698ca226c7895317e6e800034be986452dbd2593298d50e87d",
    ),
}
TAG_FILES = (
    PinnedFile(
        "ram_tag_list.txt",
        f"{_TAG_DATA}ram_tag_list.txt",
        "5d96d2f7225527480ad773aaac76b6e5c08a18adf6eae9ca7d2ab923d5e7bd8b",
    ),
    PinnedFile(
        "ram_tag_list_threshold.txt",
        f"{_TAG_DATA}ram_tag_list_threshold.txt",
        "b6f81d0de1bc7f9c251af512c413eae976c77dbfbadf700d4e3d90510f4c6447",
    ),
)


PINNED_REVISIONS = {
    "IDEA-Research/grounding-dino-tiny": "a2bb814dd30d776dcf7e30523b00659f4f141c71",
    "facebook/sam-vit-huge": "87aecf0df4ce6b30cd7de76e87673c49644bdf67",
}
"""Commits of the default checkpoints on the hub."""


def revision_of(repository: str, asked: str | None) -> str:
    """The revision to take of a checkpoint: what is asked for, else the pinned one, else what the hub has now."""
    return asked or PINNED_REVISIONS.get(repository, "main")


@dataclass(frozen=True)
class HubCheckpoint:
    """A checkpoint in transformers' format on the hub: its repository and revision."""

    repository: str
    revision: str = "main"

    @property
    def folder_name(self) -> str:
        """What its folder is called here."""
        return self.repository.rsplit("/", 1)[-1]


def fetch_models(output: Path, pinned: Sequence[PinnedFile], checkpoints: Sequence[HubCheckpoint]) -> None:
    """Brings all files into `output`; those that are there stay, and wrong ones are named.

    Args:
        output: folder, made if need be.
        pinned: files that go there as they are.
        checkpoints: each goes into a folder of its own, with `fetched.json`, which names the commit.

    Raises:
        ValueError: lists all that is missing, with its address and its place, if something can't be fetched.
    """
    output.mkdir(parents=True, exist_ok=True)
    missing: list[str] = []
    problems: list[str] = []
    for file in pinned:
        path = output / file.name
        is_there = path.is_file()
        try:
            if not is_there:
                _download(file, path)
            _check(file, path, is_there)
        except _UNREACHABLE as error:
            problems.append(f"{file.name}: {_first_line(error)}")
            missing.append(f"{file.url}\n      -> {path}   (sha256 {file.sha256})")
    for checkpoint in checkpoints:
        folder = output / checkpoint.folder_name
        try:
            _fetch_checkpoint(checkpoint, folder)
        except _UNREACHABLE as error:
            problems.append(f"{checkpoint.repository}: {_first_line(error)}")
            missing.append(
                f"https://huggingface.co/{checkpoint.repository}/tree/{checkpoint.revision}   "
                f"({', '.join(_CHECKPOINT_FILES)})\n      -> {folder}/"
            )
    if missing:
        raise ValueError(
            "not everything could be fetched:\n  "
            + "\n  ".join(problems)
            + "\nPut these there by hand, from a machine that can reach them, and call this again to check:\n    "
            + "\n    ".join(missing)
        )


def checkpoint_folder(name_or_folder: str, revision: str, flag: str) -> Path:
    """The folder of a checkpoint; one of the hub is fetched into the hub's cache, unless it is there.

    Args:
        name_or_folder: as it was given.
        revision: of a checkpoint of the hub.
        flag: the option it was given with, for the message.

    Raises:
        ValueError: neither a folder nor to be had from the hub.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{flag} {folder}: found no config.json in it, expected a checkpoint's folder")
        return folder
    try:
        return Path(snapshot_download(name_or_folder, revision=revision, allow_patterns=list(_CHECKPOINT_FILES)))
    except _UNREACHABLE as error:
        raise ValueError(
            f"{flag} {name_or_folder}: found no such folder, and the hub didn't give it ({_first_line(error)}). "
            "`patch-aligned models fetch` says which files belong where"
        ) from error


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint that decides its results, by name."""
    paths = {path for pattern in _CHECKPOINT_FILES for path in folder.glob(pattern) if path.name != _FETCHED}
    return {path.name: sha256_of(path) for path in sorted(paths)}


def commit_of(folder: Path, *, is_from_hub: bool) -> str | None:
    """The hub's commit that a checkpoint's folder holds; None for a folder that was put there by hand."""
    if is_from_hub:  # a folder of the hub's cache is called by its commit
        return folder.name
    if not (folder / _FETCHED).is_file():
        return None
    commit: str | None = json.loads((folder / _FETCHED).read_text(encoding="utf-8")).get("commit")
    return commit


def _fetch_checkpoint(checkpoint: HubCheckpoint, folder: Path) -> None:
    wanted = {"repository": checkpoint.repository, "revision": checkpoint.revision}
    if (folder / _FETCHED).is_file():
        fetched = json.loads((folder / _FETCHED).read_text(encoding="utf-8"))
        now, then = file_hashes(folder), fetched["files_sha256"]
        if changed := [name for name in now if now[name] != then.get(name)]:
            raise ValueError(f"{folder}: found {', '.join(changed)} not as fetched; move the folder away")
        if fetched.items() >= wanted.items() and now == then:
            _logger.info("%s is there", folder)
            return
    elif _is_whole(folder):
        _logger.info("%s is there; it was put there by hand, so its revision isn't known", folder)
        return
    of_config = snapshot_download(checkpoint.repository, revision=checkpoint.revision, allow_patterns="config.json")
    commit = commit_of(Path(of_config), is_from_hub=True)
    snapshot_download(checkpoint.repository, revision=commit, allow_patterns=list(_CHECKPOINT_FILES), local_dir=folder)
    with written_whole(folder / _FETCHED) as temporary:
        fetched = {**wanted, "commit": commit, "files_sha256": file_hashes(folder)}
        temporary.write_text(json.dumps(fetched, indent=1) + "\n", encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Whether it has weights and is no download that was interrupted, which the hub's client marks."""
    has_all = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return has_all and not any(folder.rglob("*.incomplete"))


def _download(file: PinnedFile, path: Path) -> None:
    if file.repository:
        hf_hub_download(file.repository, file.name, local_dir=path.parent)
        return
    with written_whole(path) as temporary, urllib.request.urlopen(file.url, timeout=_TIMEOUT_SECONDS) as answer:
        temporary.write_bytes(answer.read())


def _check(file: PinnedFile, path: Path, was_there: bool) -> None:
    if (found := sha256_of(path)) != file.sha256:
        if not was_there:
            path.unlink()
        outcome = "it stays; move it away to have another fetched" if was_there else "the file was removed again"
        raise ValueError(f"found sha256 {found}, expected {file.sha256}; {outcome}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# Checkpoints of transformers for a stage: which kind they are, and their model, whole and in float32.


def kind_of_checkpoint(name_or_folder: str, revision: str, kinds: Iterable[str]) -> str:
    """The `model_type` of a checkpoint's config.

    Args:
        name_or_folder: on the hub, or here.
        revision: of the hub's repository.
        kinds: those that will do.

    Raises:
        ValueError: for another kind.
    """
    config, _ = PreTrainedConfig.get_config_dict(name_or_folder, revision=revision)
    kind = config.get("model_type")
    if kind not in (expected := list(kinds)):
        raise ValueError(f"{name_or_folder}: found a model of type {kind!r}, expected {', '.join(expected)}")
    return str(kind)


def load_whole_model(model_class: Any, name_or_folder: str, revision: str) -> Any:
    """The model of a checkpoint, in float32 whatever its file is in: that is what half precision falls back to.

    Args:
        model_class: of transformers.
        name_or_folder: on the hub, or here.
        revision: of the hub's repository.

    Raises:
        ValueError: where weights are missing or cut off.
    """
    try:
        model, loading = model_class.from_pretrained(
            name_or_folder, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(
            f"{name_or_folder}: weights that can't be read ({error}). Fetch the checkpoint again"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{name_or_folder}: {len(missing)} weights are missing, among them {missing[0]}. Fetch the checkpoint again"
        )
    return model
