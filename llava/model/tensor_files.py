"""Finding and reading the files of a checkpoint, in a local folder or on the hub. No pickle is run: tensors alone."""

from __future__ import annotations

import json
import pickle
import zipfile
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILE = "non_lora_trainables.bin"
UNSHARDED_FILES = ("model.safetensors", "pytorch_model.bin")
"""A whole model's weights in one file, in the order of preference; `<name>.index.json` lists shards."""
WEIGHT_FILES = (*UNSHARDED_FILES, *(f"{name}.index.json" for name in UNSHARDED_FILES))
"""Any of these is a sign of a whole model's weights."""


class Form(Enum):
    """What a checkpoint holds."""

    WHOLE_MODEL = "a whole model"
    PROJECTOR = "a projector alone (mm_projector.bin), as stage 1 writes it"
    ADAPTER = "a LoRA adapter (adapter_config.json)"


def checkpoint_form(model_path: str) -> Form:
    """Tells by its files what a checkpoint holds.

    Raises:
        FileNotFoundError: there is no such folder, and no such name on the hub, or it cannot be reached.
    """
    if not Path(model_path).is_dir():
        from huggingface_hub.errors import RemoteEntryNotFoundError
        from transformers.utils import cached_file

        try:  # asked once, with errors: `find_file` takes each failure for a missing file, after some patience
            cached_file(model_path, "config.json")
        except OSError as error:
            if not isinstance(error.__cause__, RemoteEntryNotFoundError):  # an adapter may be there without a config
                raise no_checkpoint(model_path, error) from error
    if find_file(model_path, ADAPTER_CONFIG_FILE) is not None:
        return Form.ADAPTER
    # Published checkpoints keep the projector of stage 1 beside the weights of stage 2.
    has_weights = any(find_file(model_path, name) is not None for name in WEIGHT_FILES)
    if not has_weights and find_file(model_path, PROJECTOR_FILE) is not None:
        return Form.PROJECTOR
    return Form.WHOLE_MODEL


def no_checkpoint(model_path: str, error: OSError) -> FileNotFoundError:
    """The error to raise where there is nothing to load."""
    return FileNotFoundError(
        f"No checkpoint at {model_path}: expected a folder with config.json, or a name on the hub. "
        f"{str(error).splitlines()[0]}"
    )


def recorded_base(model_path: str) -> str:
    """What an adapter's config says of its base, to be added to a message; empty where there is nothing to say."""
    path = find_file(model_path, ADAPTER_CONFIG_FILE)
    name = path and json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return f" (in training it was {name})" if name else ""


def find_file(model_path: str, name: str) -> str | None:
    """Path of a file of a checkpoint, in a local folder or fetched from the hub; None where there is none."""
    if Path(model_path).is_dir():
        path = Path(model_path) / name
        return str(path) if path.is_file() else None
    if model_path.startswith(("/", ".", "~")) or model_path.count("/") > 1:
        return None  # a folder that is not there: no name on the hub looks like this
    from transformers.utils import cached_file

    return cached_file(
        model_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of one safetensors or torch file, as stored, on the CPU.

    Raises:
        ValueError: the file cannot be read, or holds more than tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}). Copy or download it again.") from error
    try:
        # Files of before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (FileNotFoundError, PermissionError):
        raise
    except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:  # OSError: sought beyond a cut off end
        raise ValueError(unreadable(path, error)) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}; expected a dict of tensors, as torch.save writes it.")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} holds more than tensors: {others[:5]}. Save the state dict alone.")
    return state


def unreadable(path: str | Path, error: Exception) -> str:
    """What to say of a torch file that cannot be read safely."""
    return (
        f"{path} cannot be read as a file of tensors. It is cut off, or its pickle holds other objects, which are "
        "never run here. Download it again, or ask those who made it for the state dict alone, best as safetensors. "
        f"({(str(error) or 'nothing in it').splitlines()[0]})"
    )
