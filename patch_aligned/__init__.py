"""Patch-aligned training: the method as a plugin of `llava`, its data and its measures."""

import importlib
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

own_packages = runpy.run_path(str(Path(__file__).parents[1] / "llava" / "own_packages.py"))
own_packages["require_own_packages"]("llava")

if TYPE_CHECKING:
    from patch_aligned.analysis.localisation import localise
    from patch_aligned.models.layouts import layouts_of
    from patch_aligned.train.trainer import PatchAlignedMixin, PatchAlignment, train_projector_only

__all__ = ["PatchAlignedMixin", "PatchAlignment", "layouts_of", "localise", "train_projector_only"]

_MODULES = {"layouts_of": "patch_aligned.models.layouts", "localise": "patch_aligned.analysis.localisation"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "patch_aligned.train.trainer")
    return getattr(importlib.import_module(module), name)  # they need torch or transformers
