"""The models' files: download them, or say which file to put where; and load what transformers has.

RAM's files are pinned by their hashes, the tag list and its thresholds by their commit as well. The default Grounding
DINO and SAM are pinned by their commits; others are taken at the revision that is given, or at the current `main`. The
commit is stored, and every annotation run records it with the hashes of the files that it read.
"""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from patch_aligned.annotate.options import DETECTOR, SAM, SAM3, SAM3_LICENCE
from patch_aligned.files import sha256_of, written_whole

_logger = logging.getLogger(__name__)

_CHECKPOINT_FILES = ("*.json", "*.txt", "*.jinja", "*.safetensors")
_TAG_DATA = (
    "https://raw.githubusercontent.com/xinyu1205/recognize-anything/7cb804a8609e9f4b1a50b7f31436d2df40bb9481/ram/data/"
)
_UNREACHABLE = (OSError, ValueError, HfHubHTTPError)
_TIMEOUT_SECONDS = 60
_FETCHED = "fetched.json"


class PinnedFile(NamedTuple):
    """One published file. `name` is its name here too; `repository` is on the hub, None for a file from elsewhere."""

    name: str
    url: str
    sha256: str
    repository: str | None = None


def _on_hub(repository: str, name: str, sha256: str) -> PinnedFile:
    return PinnedFile(name, f"https://huggingface.co/{repository}/resolve/main/{name}", sha256, repository)


_RAM, _RAM_PLUS = "xinyu1205/recognize_anything_model", "xinyu1205/recognize-anything-plus-model"
RAM_WEIGHTS = {
    "ram": _on_hub(_RAM, "ram_swin_large_14m.pth", "15c729c793af28b9d107c69f85836a1356d76ea830d4714699fb62e55fcc08ed"),
    "ram_plus": _on_hub(
        _RAM_PLUS, "ram_plus_swin_large_14m.pth", "497c178836ba66698ca226c7895317e6e800034be986452dbd2593298d50e87d"
    ),
}
TAG_FILES = tuple(
    PinnedFile(name, _TAG_DATA + name, sha256)
    for name, sha256 in (
        ("ram_tag_list.txt", "5d96d2f7225527480ad773aaac76b6e5c08a18adf6eae9ca7d2ab923d5e7bd8b"),
        ("ram_tag_list_threshold.txt", "b6f81d0de1bc7f9c251af512c413eae976c77dbfbadf700d4e3d90510f4c6447"),
    )
)
PINNED_REVISIONS = {
    DETECTOR: "a2bb814dd30d776dcf7e30523b00659f4f141c71",
    SAM: "87aecf0df4ce6b30cd7de76e87673c49644bdf67",
    SAM3: "3c879f39826c281e95690f02c7821c4de09afae7",
}
"""Commits of the default checkpoints on the hub."""


def revision_of(repository: str, given: str | None) -> str:
    """Return the revision to take of a checkpoint: the given one, else the pinned one, else the current `main`."""
    return given or PINNED_REVISIONS.get(repository, "main")


def folder_name(repository: str) -> str:
    """Return the name of a checkpoint's folder here."""
    return repository.rsplit("/", 1)[-1]


def fetch_models(output: Path, pinned: Sequence[PinnedFile], checkpoints: Mapping[str, str | None]) -> None:
    """Download pinned files, and checkpoints by repository and revision, into `output`. Existing files stay.

    A checkpoint gets a folder of its own, with `fetched.json`, which names the commit. `ValueError` lists all that is
    missing, with its address and its place.
    """
    output.mkdir(parents=True, exist_ok=True)
    missing: list[str] = []
    problems: list[str] = []
    for file in pinned:
        path = output / file.name
        try:
            _fetch_file(file, path)
        except _UNREACHABLE as error:
            problems.append(f"{file.name}: {_first_line(error)}")
            missing.append(f"{file.url}\n      -> {path}   (sha256 {file.sha256})")
    for repository, given in checkpoints.items():
        folder, revision = output / folder_name(repository), revision_of(repository, given)
        try:
            _fetch_checkpoint(repository, revision, folder)
        except _UNREACHABLE as error:
            problems.append(f"{repository}: {_first_line(error)}")
            missing.append(
                f"https://huggingface.co/{repository}/tree/{revision}   ({', '.join(_CHECKPOINT_FILES)})\n"
                f"      -> {folder}/"
            )
    if missing:
        raise ValueError(
            "not everything could be downloaded:\n  "
            + "\n  ".join(problems)
            + "\nCopy these files here from a machine that can reach them, and run this command again to check:\n    "
            + "\n    ".join(missing)
        )


def _fetch_file(file: PinnedFile, path: Path) -> None:
    was_there = path.is_file()
    if not was_there and file.repository:
        hf_hub_download(file.repository, file.name, local_dir=path.parent)
    elif not was_there:
        with written_whole(path) as temporary, urllib.request.urlopen(file.url, timeout=_TIMEOUT_SECONDS) as answer:
            temporary.write_bytes(answer.read())
    if (found := sha256_of(path)) != file.sha256:
        if not was_there:
            path.unlink()
        outcome = "it stays; move it away to download it again" if was_there else "the file was removed again"
        raise ValueError(f"found sha256 {found}, expected {file.sha256}; {outcome}")


def _fetch_checkpoint(repository: str, revision: str, folder: Path) -> None:
    wanted = {"repository": repository, "revision": revision}
    if (folder / _FETCHED).is_file():
        fetched = json.loads((folder / _FETCHED).read_text(encoding="utf-8"))
        now, then = file_hashes(folder), fetched["files_sha256"]
        if changed := [name for name in now if now[name] != then.get(name)]:
            raise ValueError(f"{folder}: found {', '.join(changed)} changed since the download; move the folder away")
        if fetched.items() >= wanted.items() and now == then:
            _logger.info("%s is there", folder)
            return
    elif _is_complete(folder):
        _logger.info("%s is there; it was not downloaded by this command, so its revision is not known", folder)
        return
    of_config = snapshot_download(repository, revision=revision, allow_patterns="config.json")
    commit = Path(of_config).name  # a folder of the hub's cache has the name of its commit
    snapshot_download(repository, revision=commit, allow_patterns=list(_CHECKPOINT_FILES), local_dir=folder)
    with written_whole(folder / _FETCHED) as temporary:
        fetched = {**wanted, "commit": commit, "files_sha256": file_hashes(folder)}
        temporary.write_text(json.dumps(fetched, indent=1) + "\n", encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    """Whether it has weights and is no interrupted download, which the hub's client marks."""
    has_all = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return has_all and not any(folder.rglob("*.incomplete"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint that determines its results, by name."""
    paths = {path for pattern in _CHECKPOINT_FILES for path in folder.glob(pattern) if path.name != _FETCHED}
    return {path.name: sha256_of(path) for path in sorted(paths)}


def checkpoint_folder(name_or_folder: str, revision: str | None, flag: str) -> Path:
    """Return a checkpoint's folder; a name on the hub is downloaded into the hub's cache unless it is there."""
    folder = Path(name_or_folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{flag} {folder}: found no config.json in it, expected a checkpoint's folder")
        return folder
    revision = revision_of(name_or_folder, revision)
    try:
        return Path(snapshot_download(name_or_folder, revision=revision, allow_patterns=list(_CHECKPOINT_FILES)))
    except _UNREACHABLE as error:
        hint = "`patch-aligned models fetch` says which files to put where"
        raise ValueError(
            f"{flag} {name_or_folder}: found no such folder, and the hub did not deliver it ({_first_line(error)}). "
            + (f"Its weights are {SAM3_LICENCE}" if name_or_folder == SAM3 else hint)
        ) from error


def identity_of(name_or_folder: str, folder: Path) -> dict[str, Any]:
    """Return what settings.json records of a checkpoint: its name, commit (None if not known) and files' hashes."""
    is_local, fetched = Path(name_or_folder) == folder, folder / _FETCHED
    commit = None if is_local else folder.name
    if is_local and fetched.is_file():
        commit = json.loads(fetched.read_text(encoding="utf-8")).get("commit")
    model = folder.resolve().name if is_local else name_or_folder
    return {"model": model, "revision": commit, "files_sha256": file_hashes(folder)}


def class_of_checkpoint(folder: str | Path, classes: Mapping[str, Any]) -> Any:
    """Return the entry of `classes` for the `model_type` of a checkpoint."""
    config, _ = PreTrainedConfig.get_config_dict(folder)
    kind: Any = config.get("model_type")
    if kind not in classes:
        raise ValueError(f"{folder}: found a model of type {kind!r}, expected {', '.join(classes)}")
    return classes[kind]


def load_model(model_class: Any, folder: str | Path) -> Any:
    """Load a checkpoint of transformers in float32, whatever type it is stored in: half precision falls back to it."""
    try:
        model, loading = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"{folder}: weights that cannot be read ({error}). Download the checkpoint again") from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{folder}: {len(missing)} weights are missing, among them {missing[0]}. Download the checkpoint again"
        )
    return model


class DeviceModel:
    """A model for inference on one device; `dtype`, of autocast, is by default bfloat16 on a GPU, float32 on a CPU."""

    settings: dict[str, Any]  # all that determines the results, as plain values for settings.json

    def __init__(self, model: Any, device: torch.device | str, dtype: torch.dtype | None) -> None:
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.dtype_name = str(self.dtype).removeprefix("torch.")  # as settings.json has it
        self.model = model.requires_grad_(False).eval().to(self.device)

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        """Compute in a type; float32 for none."""
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def finite_or_none(self, compute: Callable[[Sequence[int], torch.dtype], list[Any]], count: int) -> list[Any]:
        """Return what `compute` gives of rows in a type, and in float32 of those of which it gave None: not finite."""
        found = compute(range(count), self.dtype)
        again = [row for row, result in enumerate(found) if result is None]
        if again and self.dtype != torch.float32:
            for row, result in zip(again, compute(again, torch.float32), strict=True):
                found[row] = result
        return found
