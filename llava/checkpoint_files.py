"""The files that make a checkpoint, local or on the hub, looked at before torch is imported to read them."""

from __future__ import annotations

import json
import logging
from enum import Enum
from pathlib import Path

logger = logging.getLogger(__name__)

PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILE = "non_lora_trainables.bin"
UNSHARDED_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights of a full model in one file, in order of preference; `<name>.index.json` lists shards."""
WEIGHT_FILES = (*UNSHARDED_FILES, *(f"{name}.index.json" for name in UNSHARDED_FILES))
"""A checkpoint with any of these files has the weights of a full model."""


class Form(Enum):
    """Kind of a checkpoint."""

    WHOLE_MODEL = "a whole model"
    PROJECTOR = "a projector alone (mm_projector.bin), as stage 1 writes it"
    ADAPTER = "a LoRA adapter (adapter_config.json)"


def checkpoint_form(model_path: str) -> Form:
    """Detect the kind of a checkpoint from its files. Raises `FileNotFoundError` if it is not here, nor on the hub."""
    if not Path(model_path).is_dir():
        require_place(model_path)
        from huggingface_hub.errors import RemoteEntryNotFoundError
        from transformers.utils import cached_file

        try:  # `find_file` treats every failure as a missing file, after retries, so check for errors once here
            cached_file(model_path, "config.json")
        except OSError as error:
            if not isinstance(error.__cause__, RemoteEntryNotFoundError):  # adapters may have no config.json
                raise no_checkpoint(model_path, error) from error
    if find_file(model_path, ADAPTER_CONFIG_FILE) is not None:
        return Form.ADAPTER
    # Published checkpoints have the projector of stage 1 beside the weights of stage 2.
    has_weights = any(find_file(model_path, name) is not None for name in WEIGHT_FILES)
    if not has_weights and find_file(model_path, PROJECTOR_FILE) is not None:
        return Form.PROJECTOR
    return Form.WHOLE_MODEL


def no_checkpoint(model_path: str, error: OSError) -> FileNotFoundError:
    """Build the error to raise if there is nothing to load."""
    return FileNotFoundError(
        f"No checkpoint at {model_path}: expected a folder with config.json, or a name on the hub. "
        f"{str(error).splitlines()[0]}"
    )


def no_config(folder: str) -> FileNotFoundError:
    """Build the error to raise for a folder without config."""
    below = sorted(map(str, Path(folder).glob("*/config.json")))
    hint = f" Did you mean a folder in it? {', '.join(below)}" if below else ""
    return FileNotFoundError(f"{folder} holds no config.json.{hint}")


def require_checkpoint(model_path: str, model_base: str | None) -> None:
    """Raise `OSError` or `ValueError` for a checkpoint that cannot be loaded, as far as its files say."""
    form = checkpoint_form(model_path)
    if form is not Form.WHOLE_MODEL:
        whose_weights(form, model_path, model_base)
    elif find_file(model_path, "config.json") is None:
        raise no_config(model_path)


def require_whole_model(name: str) -> None:
    """Raise `ValueError` for a projector or an adapter as the model that training starts from."""
    form = checkpoint_form(name)
    if form is not Form.WHOLE_MODEL:
        raise ValueError(
            f"--model_name_or_path {name} holds {form.value}; expected {Form.WHOLE_MODEL.value}. Pass the model it was "
            f"trained on{recorded_base(name)}; a projector is given as --pretrain_mm_mlp_adapter "
            f"{name}/mm_projector.bin, an adapter as --lora_weight_path {name}."
        )


def recorded_base(model_path: str) -> str:
    """Return a remark on the base named in an adapter's config, for messages; empty if there is none."""
    path = find_file(model_path, ADAPTER_CONFIG_FILE)
    name = path and json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return f" (in training it was {name})" if name else ""


def may_be_hub_name(place: str) -> bool:
    """Whether a place may be a name on the hub: `owner/name`, where neither it nor a folder `owner` is here."""
    owner, _, name = place.partition("/")
    has_form = bool(name) and "/" not in name and not place.startswith(("/", ".", "~"))
    return has_form and not Path(place).exists() and not Path(owner).is_dir()


def require_place(place: str) -> None:
    """Raise `FileNotFoundError` for what is not here and cannot be a name on the hub, before the hub is asked."""
    if not Path(place).exists() and not may_be_hub_name(place):
        raise no_checkpoint(place, FileNotFoundError("There is no such folder."))


def find_file(model_path: str, name: str) -> str | None:
    """Return the path of a checkpoint's file, local or downloaded from the hub, or None if there is none."""
    if Path(model_path).is_dir():
        path = Path(model_path) / name
        return str(path) if path.is_file() else None
    if not may_be_hub_name(model_path):
        return None
    from transformers.utils import cached_file

    return cached_file(
        model_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def whose_weights(form: Form, model_path: str, model_base: str | None) -> str:
    """Return the path of the LLM's weights: the checkpoint itself, or its base, which must be given and whole."""
    if form is Form.WHOLE_MODEL:
        if model_base is not None:
            logger.warning("%s holds %s: --model-base %s is not read.", model_path, form.value, model_base)
        return model_path
    if model_base is None:
        raise ValueError(
            f"{model_path} holds {form.value}. Pass the model it was trained on: --model-base FOLDER_OR_HUB_NAME"
            f"{recorded_base(model_path)}."
        )
    base_form = checkpoint_form(model_base)
    if base_form is not Form.WHOLE_MODEL:
        raise ValueError(f"--model-base {model_base} holds {base_form.value}; expected {Form.WHOLE_MODEL.value}.")
    return model_base
