"""What a checkpoint is and says of itself: its weights by content, its config, the template that it is talked to in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava.conversation import conversation_mode
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import read_config
from llava.model.tensor_files import Form, checkpoint_form
from patch_aligned.checkpoint_hash import checkpoint_hash
from patch_aligned.results.run_file import ModelIdentity


def identify(name: str, path: str, base: str | None) -> ModelIdentity:
    """Whose answers they are, by the content of the files; of a base that is a name on the hub, by its name.

    Raises:
        FileNotFoundError: a folder has no weights.
    """
    base_sha256 = checkpoint_hash(base).sha256 if base is not None and Path(base).exists() else None
    return ModelIdentity(name, path, checkpoint_hash(path).sha256, base, base_sha256)


def read_llava_config(path: str, base: str | None) -> Any:
    """The config of a checkpoint, or of its base where it has none.

    Raises:
        OSError, ValueError: there is no config, or it is no LLaVA's.
    """
    has_config = (Path(path) / "config.json").is_file()  # adapters that peft alone has written have none
    config = read_config(path if has_config or base is None else base)
    if not getattr(config, "mm_vision_tower", None):
        raise ValueError(f"{path}: its config names no vision tower; expected a LLaVA, as benchmarks show pictures")
    return config


def own_conversation(path: str, config: Any) -> str:
    """Name of the template that a checkpoint is talked to in: the one it was trained in, where that is known.

    Training records it in the config. A projector whose config records none is of upstream's stage 1, which trains in
    `plain`. Of other checkpoints the folder's name decides, as upstream has it; what tables call them does not.
    """
    if checkpoint_form(path) is Form.PROJECTOR and getattr(config, "conversation_version", None) is None:
        return "plain"
    return conversation_mode(get_model_name_from_path(path), config)
