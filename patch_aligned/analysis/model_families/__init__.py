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
    """The module for a checkpoint's folder; None if it is LLaVA's own, or of no known family."""
    file = path / "config.json"
    if not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    # LLaVA's own configs may call themselves `llava` too, but have no parts.
    return FAMILY_MODULES.get(config.get("model_type", "")) if "text_config" in config else None


def load_family(name: str, path: Path, device: str = "cpu") -> tuple[Tower, MeasuredProjector]:
    """A model's tower and projector with its word embeddings; the layers of its LLM are neither built nor read.

    Args:
        name: of the projector in tables.
        path: the checkpoint's folder.
        device: where tower and projector run, in float32.

    Raises:
        ValueError: the family is unknown, or the checkpoint lacks a part.
    """
    family = family_of(path)
    if family is None:
        raise ValueError(
            f"{path}: config.json names none of the model types {', '.join(FAMILY_MODULES)}. Add a file to "
            "patch_aligned/analysis/model_families for another family."
        )
    tower_class = importlib.import_module(f"{__name__}.{family}").FamilyTower
    tower = tower_class(path, device)
    return tower, tower.measured_projector(name)
