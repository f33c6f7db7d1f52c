"""Patch-aligned training: the method as a plugin of `llava`, its data and its measures."""

import importlib
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

own_packages = runpy.run_path(str(Path(__file__).parents[1] / "llava" / "own_packages.py"))
own_packages["require_own_packages"]("llava")

if TYPE_CHECKING:
    from patch_aligned.models.layouts import layouts_of
    from patch_aligned.train.trainer import PatchAlignedMixin, PatchAlignment, train_projector_only

__all__ = ["PatchAlignedMixin", "PatchAlignment", "layouts_of", "train_projector_only"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "patch_aligned.models.layouts" if name == "layouts_of" else "patch_aligned.train.trainer"
    return getattr(importlib.import_module(module), name)  # they need transformers
