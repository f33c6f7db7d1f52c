"""Families of transformers whose projectors can be measured: a file each, chosen by the config's `model_type`.

A family says how its images are made square, which features its projector reads, and where that projector is. What is
asked of it: one projected token for each cell of a square grid over the image.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from patch_aligned.analysis.embeddings import MeasuredProjector, Tower

FAMILY_MODULES = {
    "llava": "llava_hf",
    "llava_next": "llava_next",
    "paligemma": "paligemma",
    "idefics3": "idefics3",
    "smolvlm": "idefics3",
}
"""The module of each `model_type`, below this package."""


def family_of(path: Path) -> str | None:
    """The module for a checkpoint's folder; None if it is no folder of transformers, such as LLaVA's own.

    Raises:
        ValueError: it is a model of transformers, but of no known family, or its config.json is broken.
    """
    file = path / "config.json"
    if not file.is_file():
        return None
    config = read_config(file)
    if "text_config" not in config:  # LLaVA's own configs may call themselves `llava` too, but have no parts
        return None
    model_type = config.get("model_type", "")
    if model_type not in FAMILY_MODULES:
        raise ValueError(
            f"{path}: config.json says model_type {model_type!r}; expected one of {', '.join(FAMILY_MODULES)}. "
            "Another family is one file in patch_aligned/analysis/model_families."
        )
    return FAMILY_MODULES[model_type]


def read_config(file: Path) -> dict[str, Any]:
    """What a checkpoint's config.json says.

    Raises:
        ValueError: it is broken.
    """
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: found no JSON ({error}); expected a checkpoint's config. Copy it anew.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: found a {type(config).__name__}; expected a checkpoint's config. Copy it anew.")
    return config


def load_family(name: str, path: Path, device: str = "cpu") -> tuple[Tower, MeasuredProjector]:
    """A model's tower and projector with its word embeddings; the layers of its LLM are neither built nor read.

    Args:
        name: of the projector in tables.
        path: the checkpoint's folder, for which `family_of` names a module.
        device: where tower and projector run, in float32.

    Raises:
        ValueError: the family is unknown, or the checkpoint lacks a part.
    """
    tower_class = importlib.import_module(f"{__name__}.{family_of(path)}").FamilyTower
    tower = tower_class(path, device)
    return tower, tower.measured_projector(name)
