"""Patch-aligned training: the method as a plugin of `llava`, its data and its measures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patch_aligned.models.layouts import layouts_of

__all__ = ["layouts_of"]


def __getattr__(name: str) -> Any:
    """Import what users see only when they use it: it needs transformers."""
    if name == "layouts_of":
        from patch_aligned.models.layouts import layouts_of

        return layouts_of
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
