"""Map visual tokens to cells of the original image.

Coordinates are continuous pixels of the image file: pixel `i` spans `[i, i + 1)`, so 0 and the width are outer edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np

Treatment = Literal["crop", "pad", "squeeze"]


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """Grid of visual tokens over an image or a part of it. All tiles of one canvas form one grid.

    Attributes:
        image_wh: width and height of the image, pixels.
        x_edges: `[cols + 1]` column edges in pixels of the original image. A cell may extend beyond the image.
        y_edges: `[rows + 1]` row edges.
        tokens: `[rows, cols]` index of each cell's token in the image's visual tokens. Default: row-major.
        kind: `whole` image, `tiles` of it, or a `crop`.

    Raises:
        ValueError: edges are not increasing, or `tokens` has the wrong shape.
    """

    image_wh: tuple[int, int]
    x_edges: tuple[float, ...]
    y_edges: tuple[float, ...]
    tokens: np.ndarray = None  # type: ignore[assignment]  # default set in __post_init__
    kind: Literal["whole", "tiles", "crop"] = "whole"

    def __post_init__(self) -> None:
        for name, edges in (("x_edges", self.x_edges), ("y_edges", self.y_edges)):
            if len(edges) < 2 or not all(before < after for before, after in pairwise(edges)):
                raise ValueError(f"{name}: found {edges}, expected at least two rising edges in pixels")
        if self.tokens is None:
            object.__setattr__(self, "tokens", np.arange(self.rows * self.cols).reshape(self.shape))
        if self.tokens.shape != self.shape:
            raise ValueError(
                f"tokens: found shape {self.tokens.shape}, expected {self.shape}, a position for each cell"
            )

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.y_edges) - 1

    @property
    def cols(self) -> int:
        """Number of columns."""
        return len(self.x_edges) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.cols

    @property
    def box_xyxy_px(self) -> tuple[float, float, float, float]:
        """Bounding box of all cells. It may extend beyond the image."""
        return self.x_edges[0], self.y_edges[0], self.x_edges[-1], self.y_edges[-1]

    def cells_under(self, x_px: Any, y_px: Any) -> np.ndarray:
        """Return the cell at each crossing of columns and rows: `[len(y_px), len(x_px)]`, row-major; -1 outside."""
        cols = np.searchsorted(self.x_edges, x_px, side="right") - 1
        rows = np.searchsorted(self.y_edges, y_px, side="right") - 1
        inside = np.logical_and.outer((rows >= 0) & (rows < self.rows), (cols >= 0) & (cols < self.cols))
        return np.where(inside, np.add.outer(rows * self.cols, cols), -1)


@dataclass(frozen=True, eq=False)
class Layout:
    """Layout of all visual tokens of one image, in the order in which the LLM reads them.

    Attributes:
        grids: one for LLaVA; several for models that split an image into tiles.
        length: number of visual tokens, including those without a cell (row separators).
    """

    grids: tuple[TokenGrid, ...]
    length: int

    @property
    def image_wh(self) -> tuple[int, int]:
        """Width and height of the image, pixels."""
        return self.grids[0].image_wh

    @property
    def whole(self) -> TokenGrid:
        """The grid over the whole image; the first one, such as that of the tiles, where there is none."""
        return next((grid for grid in self.grids if grid.kind == "whole"), self.grids[0])

    def heat_map(self, values: Any, kind: str | None = None) -> np.ndarray:
        """Paint a value of each token on the pixels of its cell, such as attention or a cosine.

        Args:
            values: `[length]`, one for each visual token, in order.
            kind: only grids of this kind, `whole`, `tiles` or `crop`. Default: all, averaged where they overlap.

        Returns:
            float64 `[height, width]`, the size of the image; NaN where no token looks.

        Raises:
            ValueError: there is another number of values than tokens, or no grid of this kind.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.shape != (self.length,):
            raise ValueError(
                f"values: found shape {values.shape}, expected ({self.length},), one for each visual token"
            )
        grids = [grid for grid in self.grids if kind in (None, grid.kind)]
        if not grids:
            raise ValueError(f"kind: found {kind!r}, expected one of {sorted({grid.kind for grid in self.grids})}")
        width, height = self.image_wh
        total, count = np.zeros((height, width)), np.zeros((height, width))
        for grid in grids:
            cols = np.searchsorted(grid.x_edges, np.arange(width) + 0.5) - 1  # the cell under each pixel's centre
            rows = np.searchsorted(grid.y_edges, np.arange(height) + 0.5) - 1
            seen = np.logical_and.outer((rows >= 0) & (rows < grid.rows), (cols >= 0) & (cols < grid.cols))
            painted = values[grid.tokens[rows.clip(0, grid.rows - 1)][:, cols.clip(0, grid.cols - 1)]]
            total += np.where(seen, painted, 0)
            count += seen
        return np.divide(total, count, out=np.full((height, width), np.nan), where=count > 0)


def grid_over_box(image_wh: tuple[int, int], box_xyxy_px: Sequence[float], shape: tuple[int, int]) -> TokenGrid:
    """Divide a box in original pixels into equal cells. `shape` is (rows, cols); tokens are row-major."""
    left, top, right, bottom = box_xyxy_px
    rows, cols = shape
    x_edges = tuple(left + (right - left) * col / cols for col in range(cols + 1))
    y_edges = tuple(top + (bottom - top) * row / rows for row in range(rows + 1))
    return TokenGrid(image_wh, x_edges, y_edges)


def seen_box_xyxy_px(
    image_wh: tuple[int, int], treatment: Treatment, shortest_edge: int, processed_side: int, seen_side: int
) -> tuple[float, float, float, float]:
    """Return the box of the original image that the vision tower sees after one of LLaVA's three treatments.

    On each axis `model = (original + pad) * resized / canvas - cut`, all in whole pixels. The box is the solution for
    the edges 0 and `seen_side` of the model image.

    Args:
        image_wh: width and height of the image, pixels.
        treatment: `crop` (resize the shortest edge, then crop the centre), `pad` (centre on a square canvas, then
            resize) or `squeeze` (resize both edges).
        shortest_edge: length to which edges are resized.
        processed_side: side of the centre crop.
        seen_side: side of the upper left part of that crop which is covered by patches.
    """
    canvas_wh, resized_wh, pad_xy = image_wh, (shortest_edge, shortest_edge), (0, 0)
    if treatment == "pad":
        canvas_wh, pad_xy = (max(image_wh), max(image_wh)), square_padding_xy(image_wh)
    elif treatment == "crop":
        width, height = image_wh  # CLIP's processor truncates the longer edge to whole pixels
        resized_wh = (
            int(shortest_edge * width / height) if width > height else shortest_edge,
            int(shortest_edge * height / width) if height >= width else shortest_edge,
        )
    first, last = [], []
    for canvas, resized, pad in zip(canvas_wh, resized_wh, pad_xy, strict=True):
        cut = (resized - processed_side) // 2
        first.append(cut * canvas / resized - pad)
        last.append((cut + seen_side) * canvas / resized - pad)
    return first[0], first[1], last[0], last[1]


# Images of a dataset share few sizes. Callers compare grids by identity, so equal arguments return the same grid.
@lru_cache(maxsize=256)
def square_grid(
    image_wh: tuple[int, int],
    treatment: Treatment,
    shape: tuple[int, int],
    shortest_edge: int,
    processed_side: int | None = None,
    seen_side: int | None = None,
) -> TokenGrid:
    """Return the grid of an image made square; see `seen_box_xyxy_px`. Each side defaults to the one before it."""
    processed_side = processed_side or shortest_edge
    box = seen_box_xyxy_px(image_wh, treatment, shortest_edge, processed_side, seen_side or processed_side)
    return grid_over_box(image_wh, box, shape)


def square_padding_xy(image_wh: tuple[int, int]) -> tuple[int, int]:
    """Return the padding left of and above an image on its square canvas; an odd remainder goes right or below."""
    width, height = image_wh
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2


def boxes_xyxy_to_square01(boxes_xyxy_px: Any, image_wh: tuple[int, int]) -> np.ndarray:
    """Convert boxes `[..., 4]` from original pixels to 0..1 of the padded square, the frame of LLaVA-1.5's boxes."""
    return (np.asarray(boxes_xyxy_px, dtype=np.float64) + np.tile(square_padding_xy(image_wh), 2)) / max(image_wh)


def boxes_xyxy_from_square01(boxes_xyxy_square01: Any, image_wh: tuple[int, int]) -> np.ndarray:
    """Convert boxes `[..., 4]` from 0..1 of the padded square to original pixels, without clipping."""
    return np.asarray(boxes_xyxy_square01, dtype=np.float64) * max(image_wh) - np.tile(square_padding_xy(image_wh), 2)


def boxes_xyxy_from_image01(boxes_xyxy_image01: Any, image_wh: tuple[int, int]) -> np.ndarray:
    """Convert boxes `[..., 4]` from 0..1 of the image's width and height to original pixels, without clipping."""
    return np.asarray(boxes_xyxy_image01, dtype=np.float64) * np.tile(image_wh, 2)


def box_iou(first_xyxy: Sequence[float], second_xyxy: Sequence[float]) -> float:
    """Intersection over union of two boxes; 0 if both are empty."""
    width = min(first_xyxy[2], second_xyxy[2]) - max(first_xyxy[0], second_xyxy[0])
    height = min(first_xyxy[3], second_xyxy[3]) - max(first_xyxy[1], second_xyxy[1])
    common = max(width, 0.0) * max(height, 0.0)
    areas = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (first_xyxy, second_xyxy))
    return common / (areas - common) if areas > common else 0.0
