"""Checkpoints of transformers for a stage: which kind they are, and their model, whole and in float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig


def kind_of_checkpoint(name_or_folder: str, revision: str, kinds: Iterable[str], error: type[ValueError]) -> str:
    """The `model_type` of a checkpoint's config.

    Args:
        name_or_folder: on the hub, or here.
        revision: of the hub's repository.
        kinds: those that will do.
        error: what to raise.

    Raises:
        ValueError: as `error`, for another kind.
    """
    config, _ = PreTrainedConfig.get_config_dict(name_or_folder, revision=revision)
    kind = config.get("model_type")
    if kind not in (expected := list(kinds)):
        raise error(f"{name_or_folder}: found a model of type {kind!r}, expected {', '.join(expected)}")
    return str(kind)


def load_whole_model(model_class: Any, name_or_folder: str, revision: str, error: type[ValueError]) -> Any:
    """The model of a checkpoint, in float32 whatever its file is in: that is what half precision falls back to.

    Args:
        model_class: of transformers.
        name_or_folder: on the hub, or here.
        revision: of the hub's repository.
        error: what to raise.

    Raises:
        ValueError: as `error`, where weights are missing or cut off.
    """
    try:
        model, loading = model_class.from_pretrained(
            name_or_folder, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except SafetensorError as broken:
        raise error(f"{name_or_folder}: weights that can't be read ({broken}). Fetch the checkpoint again") from broken
    if missing := sorted(loading["missing_keys"]):
        raise error(
            f"{name_or_folder}: {len(missing)} weights are missing, among them {missing[0]}. Fetch the checkpoint again"
        )
    return model
