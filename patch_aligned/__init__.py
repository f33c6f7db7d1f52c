"""Patch-aligned training: the method as a plugin of `llava`, its data and its measures."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patch_aligned.models.layouts import layouts_of

__all__ = ["layouts_of"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("patch_aligned.models.layouts"), name)  # needs transformers
