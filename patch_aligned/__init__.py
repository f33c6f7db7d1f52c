"""Patch-aligned training: the method as a plugin of `llava`, its data and its measures."""

import importlib
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

own_packages = runpy.run_path(str(Path(__file__).parents[1] / "llava" / "own_packages.py"))
own_packages["require_own_packages"]("llava")

if TYPE_CHECKING:
    from patch_aligned.models.layouts import layouts_of

__all__ = ["layouts_of"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("patch_aligned.models.layouts"), name)  # needs transformers
