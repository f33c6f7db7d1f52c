"""What the pictures share: labels and names are drawn as they are written, and panels have no ticks and no frame.

Draw such text with `parse_math=False`, or matplotlib reads what stands between two dollar signs as a formula.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "▯"
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans", "Arial Unicode MS")


@functools.cache
def font_families() -> tuple[str, ...]:
    """The installed ones of the fonts that together know most scripts."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return tuple(name for name in _FONTS if name in installed) or ("sans-serif",)


@functools.cache
def _known_characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    fonts = [get_font(fontManager.findfont(FontProperties(family=name))) for name in font_families()]
    return frozenset().union(*(font.get_charmap() for font in fonts))


def drawable(text: str, longest: int | None = None) -> str:
    """Text with a sign for each character that no font knows, cut off with an ellipsis where it is too long."""
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"
    return "".join(character if ord(character) in _known_characters() else MISSING for character in text)


def bare(axes: Axes) -> None:
    """Takes ticks and frame away."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
