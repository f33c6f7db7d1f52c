"""Check a layout against the model itself: paint a rectangle, and see which visual tokens change.

Attention of the vision encoder is switched off, so a token depends on its own patches alone. Rectangles are painted
just inside blocks of cells: then the tokens of the block must change, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from patch_aligned.cells import Layout, TokenGrid
from patch_aligned.models.tokens import image_inputs, visual_tokens

_CHANGED = 1e-4
"""Of the largest change of a rectangle: rounding is below it, a patch above."""
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ImpulseResult:
    """What changed, summed over rectangles."""

    changed: int  # tokens that changed
    missed: int  # tokens whose cell lies in the rectangle, and that did not change
    foreign: int  # tokens that changed, and whose cell lies outside of the rectangle

    @property
    def passed(self) -> bool:
        """Whether every token looks where its cell says."""
        return self.changed > 0 and not self.missed and not self.foreign


def impulse_test(
    model: Any, processor: Any, layout: Layout, cell: float = 14, blur: float = 3, rectangles: int = 8
) -> ImpulseResult:
    """Compare a layout with the tokens that change when parts of the image do.

    Args:
        model: a model, best a `tiny_copy`; see `visual_tokens`.
        processor: its processor.
        layout: the layout of an image of any size.
        cell: side of a token's cell in pixels of the model; the default is the smallest that models have.
        blur: pixels of the model by which resizing spreads a change.
        rectangles: how many, on blocks of cells of all grids in turn.
    """
    random = np.random.default_rng(0)
    width, height = layout.image_wh
    plain = random.integers(0, 128, (height, width, 3), dtype=np.uint8)
    chosen = [layout.grids[index % len(layout.grids)] for index in range(rectangles)]
    boxes = [box for grid in chosen if (box := _inside_of_a_block(grid, cell, blur, random)) is not None]
    painted = [plain]
    for left, top, right, bottom in boxes:
        painted.append(plain.copy())
        painted[-1][top:bottom, left:right] += 128
    inputs = image_inputs(processor, [[Image.fromarray(picture)] for picture in painted])
    with _attention_off(model):
        tokens = visual_tokens(model, inputs).reshape(len(painted), layout.length, -1)  # [boxes + 1, T, D]
    change = (tokens[1:] - tokens[0]).abs().amax(dim=-1)  # [boxes, T]
    has_changed = (change > _CHANGED * change.amax(dim=-1, keepdim=True)).numpy()
    missed = foreign = 0
    for box, changed in zip(boxes, has_changed, strict=True):
        must, may = np.zeros(layout.length, dtype=bool), np.zeros(layout.length, dtype=bool)
        for grid in layout.grids:
            inside, touched = _expected(grid, box, cell, blur)
            must[grid.tokens[inside]] = True
            may[grid.tokens[touched]] = True
        missed += int((must & ~changed).sum())
        foreign += int((changed & ~may).sum())
    return ImpulseResult(int(has_changed.sum()), missed, foreign)


def _margins(grid: TokenGrid, cell: float, blur: float) -> tuple[float, float]:
    """Return how far resizing spreads a change along x and y, in pixels of the original image."""
    # A filter spans pixels of the coarser of both images.
    scales = (np.median(np.diff(edges)) / cell for edges in (grid.x_edges, grid.y_edges))
    x, y = (blur * max(1.0, float(scale)) for scale in scales)
    return x, y


def _inside_of_a_block(grid: TokenGrid, cell: float, blur: float, random: np.random.Generator) -> Box | None:
    """Return a box just inside a random block of cells; None where the grid is too small for one."""
    sides = []
    axes = zip((grid.x_edges, grid.y_edges), grid.image_wh, _margins(grid, cell, blur), strict=True)
    for edges, limit, margin in axes:
        lows = [math.ceil(max(edge, 0) + margin) for edge in edges]
        highs = [math.floor(min(edge, limit) - margin) for edge in edges]
        blocks = [(low, high) for index, low in enumerate(lows) for high in highs[index + 1 :] if low < high]
        if not blocks:
            return None
        smallest = sorted(blocks, key=lambda block: block[1] - block[0])[: max(1, len(blocks) // 2)]
        sides.append(smallest[random.integers(len(smallest))])
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def _expected(grid: TokenGrid, box: Box, cell: float, blur: float) -> tuple[np.ndarray, np.ndarray]:
    """Return which cells a box certainly changes, and which it may change: bool `[rows, cols]` each."""
    x_margin, y_margin = _margins(grid, cell, blur)
    x_overlap = _overlap(grid.x_edges, box[0], box[2])  # [cols], negative where they lie apart
    y_overlap = _overlap(grid.y_edges, box[1], box[3])  # [rows]
    inside = np.logical_and.outer(y_overlap >= y_margin, x_overlap >= x_margin)
    return inside, np.logical_and.outer(y_overlap > -y_margin, x_overlap > -x_margin)


def _overlap(edges: tuple[float, ...], low: float, high: float) -> np.ndarray:
    return np.minimum(edges[1:], high) - np.maximum(edges[:-1], low)


@contextmanager
def _attention_off(model: Any) -> Iterator[None]:
    """Let attention of the vision encoder add nothing, so that a token depends on its own patches."""
    encoder = model.get_encoder(modality="image")
    layers = [module for module in encoder.modules() if type(module).__name__.endswith("Attention")]

    def zero(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handles = [layer.register_forward_hook(zero) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
