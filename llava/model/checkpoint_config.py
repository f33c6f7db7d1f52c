"""The config of a checkpoint, of whatever age and form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from llava.model.language_model.families import llava_config
from llava.model.language_model.llava_llama import LlavaConfig
from llava.model.tensor_files import find_file, no_checkpoint

DEFAULT_CONTEXT_LENGTH = 2048


def choose_config(model_path: str, weights_path: str, customized: Any, overwrites: dict[str, Any]) -> Any:
    """The config to build the model from; a LLaVA's, where it names a vision tower."""
    if customized is not None:
        config = read_config(customized) if isinstance(customized, str) else customized
    else:  # adapters that peft alone has written have no config of the model
        config = read_config(model_path if find_file(model_path, "config.json") is not None else weights_path)
    for name, value in overwrites.items():
        setattr(config, name, value)
    return llava_config(config) if getattr(config, "mm_vision_tower", None) else config


def read_config(model_path: str, **kwargs: Any) -> Any:
    """The config of a checkpoint, or in a JSON file.

    LLaVA checkpoints of before 2024 call themselves `llava`, a name that transformers has since given to its own model.

    Args:
        model_path: folder, hub name or JSON file.
        **kwargs: of transformers' `from_pretrained`, such as `cache_dir`.

    Raises:
        FileNotFoundError: there is no config there, and no such name on the hub.
        ValueError: it is of a kind that cannot be read, such as transformers' own LLaVA.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(model_path, **kwargs)
    except OSError as error:
        raise no_checkpoint(model_path, error) from error
    model_type = values.get("model_type")
    if model_type == "llava" and "text_config" in values:
        raise ValueError(
            f"{model_path} is a LLaVA of transformers (LlavaForConditionalGeneration), whose weights are named "
            "otherwise. Convert it with llava-convert, or load it with transformers."
        )
    try:
        if model_type == "llava":
            config: Any = LlavaConfig.from_dict(values | {"model_type": LlavaConfig.model_type})
        else:
            config = AutoConfig.from_pretrained(model_path, **kwargs)
    except ValueError as error:
        raise ValueError(
            f"The config.json of {model_path} has model type `{model_type}`, which cannot be read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if tower := getattr(config, "mm_vision_tower", None):
        config.mm_vision_tower = tower_place(tower, model_path)
    return config


def tower_place(tower: str, model_path: str) -> str:
    """Where the tower that a config names is to be read from: a folder inside the checkpoint, wherever that lies, or
    what `tower` says."""
    own = Path(model_path, tower)
    return str(own) if own.is_dir() else tower


def context_length(config: Any) -> int:
    """`max_sequence_length` of the config, else 2048, upstream's rule."""
    return getattr(config, "max_sequence_length", None) or DEFAULT_CONTEXT_LENGTH
