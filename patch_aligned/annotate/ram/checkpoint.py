"""Reading RAM's weights: the published .pth is converted once to safetensors, which is read from then on.

The published files hold the optimizer's state and unused parts besides the weights (5.6 GB for RAM, of which 0.85 GB
are used). They are pickles, so they are read as tensors only, never as Python objects.
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patch_aligned.annotate.ram.model import RamConfig, RamModel
from patch_aligned.annotate.ram.published import RamCheckpointError, config_of, renamed_state
from patch_aligned.whole_files import sha256_of, written_whole

_logger = logging.getLogger(__name__)

_FORMAT = "patch_aligned ram 1"
_CONVERTED = ".converted.safetensors"
_NAMES_SHOWN = 5
# Bytes that are no pickle are run as one: they ask for what isn't there, or call what can't be called.
_BROKEN_PICKLE_ERRORS = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    ArithmeticError, struct.error,
)  # fmt: skip
_WHERE = (
    "Published are ram_swin_large_14m.pth at https://huggingface.co/xinyu1205/recognize_anything_model and "
    "ram_plus_swin_large_14m.pth at https://huggingface.co/xinyu1205/recognize-anything-plus-model"
)

_FOUND_OBJECTS = (
    "found Python objects besides tensors ({}), which are not read, as loading them can run any code. Where you trust "
    "the file, save its weights only: torch.save({{'model': torch.load(path, weights_only=False)['model']}}, new_path) "
    "and give that one"
)


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A converted file, as the JSON beside it describes it.

    Attributes:
        weights: the safetensors file.
        config: sizes of the model.
        source_name: name of the published file.
        source_bytes: its size.
        source_sha256: its hash, which says which weights made an annotation.
    """

    weights: Path
    config: RamConfig
    source_name: str
    source_bytes: int
    source_sha256: str


def load_ram(path: Path, converted_folder: Path | None = None) -> tuple[RamModel, ConvertedCheckpoint]:
    """The model of a published .pth (converted at the first time) or of a converted safetensors file.

    Args:
        path: `*.pth`, or `*.converted.safetensors` with its JSON beside it.
        converted_folder: where the converted file of a .pth is or goes; beside it by default.

    Returns:
        The model on the CPU in float32, in eval mode and without gradients, and where it comes from.

    Raises:
        RamCheckpointError: names the file and what is missing, unexpected or unreadable.
    """
    if not path.is_file():
        raise RamCheckpointError(f"{path}: found no such file; expected the weights of RAM or RAM++. {_WHERE}")
    if path.suffix == ".safetensors":
        checkpoint = _described(path)
    else:
        weights = (converted_folder or path.parent) / f"{path.stem}{_CONVERTED}"
        checkpoint = _described(weights) if _is_current(weights, path) else convert_checkpoint(path, weights)
    try:
        state = load_file(checkpoint.weights)
    except SafetensorError as error:
        raise RamCheckpointError(f"{checkpoint.weights}: {error}. Remove it, so that it is converted again") from error
    model = RamModel(checkpoint.config)
    _check_fit(state, model, checkpoint.weights)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval(), checkpoint


def convert_checkpoint(source: Path, weights: Path) -> ConvertedCheckpoint:
    """Writes the part of a published checkpoint that inference needs, and the JSON that describes it.

    Args:
        source: the published .pth.
        weights: the file to write, `*.converted.safetensors`. The JSON goes beside it, last.

    Raises:
        RamCheckpointError: if the file isn't a RAM checkpoint, with what is missing or unexpected in it.
    """
    _logger.info("Converting %s to %s. This happens once.", source, weights)
    published = _read_published(source)
    try:
        config = config_of(published)
    except RamCheckpointError as error:
        raise RamCheckpointError(f"{source}: {error}. {_WHERE}") from error
    # A copy of each: parts of one tensor, or of a mapped file, can't be saved.
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in renamed_state(published).items()}
    with torch.device("meta"):
        _check_fit(state, RamModel(config), source)
    checkpoint = ConvertedCheckpoint(weights, config, source.name, source.stat().st_size, sha256_of(source))
    save_converted(state, checkpoint)
    return checkpoint


def save_converted(state: Mapping[str, Tensor], checkpoint: ConvertedCheckpoint) -> None:
    """Writes weights under `RamModel`'s names to `checkpoint.weights`, and last the JSON that describes them.

    Raises:
        RamCheckpointError: if the folder can't be written.
    """
    weights = checkpoint.weights
    described = {
        "format": _FORMAT,
        "config": asdict(checkpoint.config),
        "source": {
            "name": checkpoint.source_name,
            "bytes": checkpoint.source_bytes,
            "sha256": checkpoint.source_sha256,
        },
    }
    try:
        weights.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(weights) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
        with written_whole(_sidecar(weights)) as temporary:
            temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RamCheckpointError(
            f"{weights}: can't be written ({error}). Make room there or the folder writable, or copy the .pth to "
            "another one"
        ) from error


def _read_published(path: Path) -> dict[str, Tensor]:
    """The state dict under the key `model`. Mapped, so that the optimizer's state is never read."""
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not is_zip and file.read(2) == b"PK":
            raise RamCheckpointError(f"{path}: cut off after {path.stat().st_size} bytes. Download it again. {_WHERE}")
    with torch.serialization.safe_globals([argparse.Namespace]):  # training arguments, plain values
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except _BROKEN_PICKLE_ERRORS as error:
            is_pickle = is_zip and isinstance(error, pickle.UnpicklingError)
            objects = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_pickle else []
            problem = (
                _FOUND_OBJECTS.format(_listed(objects)) if objects else f"not readable by torch ({error!r}). {_WHERE}"
            )
            raise RamCheckpointError(f"{path}: {problem}") from error
    state = saved.get("model") if isinstance(saved, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        found = sorted(map(str, saved)) if isinstance(saved, Mapping) else [type(saved).__name__]
        raise RamCheckpointError(
            f"{path}: found {_listed(found)}, expected a dict with tensors under 'model'. {_WHERE}"
        )
    return dict(state)


def _check_fit(state: Mapping[str, Tensor], model: RamModel, path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"missing {_listed(missing)}")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"unexpected {_listed(unexpected)}")
    wrong = [
        f"{name} of shape {list(tensor.shape)} instead of {list(expected[name])}"
        for name, tensor in state.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    if wrong:
        problems.append(_listed(wrong))
    if problems:
        raise RamCheckpointError(f"{path}: doesn't fit {model.config.kind}: {'; '.join(problems)}. {_WHERE}")


def _sidecar(weights: Path) -> Path:
    return weights.with_suffix(".json")


def _is_current(weights: Path, source: Path) -> bool:
    """Whether a conversion of this very source was finished."""
    if not weights.is_file() or not _sidecar(weights).is_file():
        return False
    source_status = source.stat()
    is_younger = _sidecar(weights).stat().st_mtime_ns >= source_status.st_mtime_ns
    return is_younger and _described(weights).source_bytes == source_status.st_size


def _described(weights: Path) -> ConvertedCheckpoint:
    sidecar = _sidecar(weights)
    again = "Remove it and give the published .pth, which is then converted"
    if not sidecar.is_file():
        raise RamCheckpointError(
            f"{weights}: found no {sidecar.name} beside it, which holds the model's sizes. {again}"
        )
    try:
        described: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
        if described["format"] != _FORMAT:
            raise RamCheckpointError(f"{sidecar}: found format {described['format']!r}, expected {_FORMAT!r}. {again}")
        sizes: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in described["config"].items()
        }
        source = described["source"]
        return ConvertedCheckpoint(weights, RamConfig(**sizes), source["name"], source["bytes"], source["sha256"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise RamCheckpointError(
            f"{sidecar}: found no description of a converted RAM model ({error!r}). {again}"
        ) from error


def _listed(names: Iterable[str]) -> str:
    all_names = list(names)
    more = len(all_names) - _NAMES_SHOWN
    return ", ".join(all_names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
