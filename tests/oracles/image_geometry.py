"""An oracle for cells and masks: areas on the grid of visual tokens in whole numbers, from decoded masks.

On each axis the image is padded, resized and cut, and all four numbers are integers:

    model = (original + pad) * resized / canvas - cut

Areas are ratios of integers, summed as integers (exactly representable in float64) and divided once, so a token whose
cell is covered by exactly half is exactly 0.5. The product decided so before it drew cells over the original image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Mode = Literal["crop", "pad", "squeeze"]

_MODE_OF_ASPECT_RATIO: dict[str | None, Mode] = {None: "crop", "square": "crop", "pad": "pad", "anyres": "squeeze"}


class AxisMap(NamedTuple):
    """What happens along one axis: `model = (original + pad) * resized / canvas - cut`; all in pixels."""

    pad: int
    canvas: int
    resized: int
    cut: int


class AreaTables(NamedTuple):
    """How far each cell is filled by the pixels before a given one, as whole numbers of a common unit of length.

    Pixel (x, y) covers `(rows_before[y + 1, r] - rows_before[y, r]) * (cols_before[x + 1, c] - cols_before[x, c])` of
    the area `cell_area` of cell (r, c). Parts of a cell outside the image belong to no pixel.

    Attributes:
        rows_before: float64 `[height + 1, rows]`, from 0 to the cell's height (less at the padding).
        cols_before: float64 `[width + 1, cols]`, likewise.
        cell_area: area of one cell in the square of the unit.
    """

    rows_before: np.ndarray
    cols_before: np.ndarray
    cell_area: int


@dataclass(frozen=True)
class ImageGeometry:
    """What happened to one image on its way into the vision tower.

    Attributes:
        original_wh: width and height of the image file, pixels.
        side: width and height of the model image, pixels: what the tower's patches cover.
        mode: `crop` (shortest edge resized, centre cut out), `pad` (centred on a square canvas, then resized) or
            `squeeze` (the whole image squeezed to the square: anyres' base tile, or what SigLIP's processor does).
        grid: rows and columns of visual tokens over the model image.
        shortest_edge: length to which the shortest edge is resized before the centre crop of `side`; None means `side`,
            as CLIP's processors have it.
        processed_side: side of the image processor's output, of whose left upper corner the model image is a part; None
            means `side`. They differ where patches do not fill the output: 27 of 14 pixels leave 6 of SigLIP's 384
            unseen.
    """

    original_wh: tuple[int, int]
    side: int
    mode: Mode
    grid: tuple[int, int]
    shortest_edge: int | None = None
    processed_side: int | None = None

    def __post_init__(self) -> None:
        optional = [length for length in (self.shortest_edge, self.processed_side) if length is not None]
        numbers = [*self.original_wh, self.side, *self.grid, *optional]
        if len(self.original_wh) != 2 or len(self.grid) != 2 or any(not isinstance(n, int) or n < 1 for n in numbers):
            raise ValueError(f"sizes must be whole pixels and at least 1, found {self}")
        if self.mode not in ("crop", "pad", "squeeze"):
            raise ValueError(f"mode: found {self.mode!r}, expected 'crop', 'pad' or 'squeeze'")

    @classmethod
    def of(
        cls,
        image_aspect_ratio: str | None,
        original_wh: Sequence[int],
        side: int,
        grid: Sequence[int],
        shortest_edge: int | None = None,
    ) -> ImageGeometry:
        """Geometry for LLaVA's configuration value `image_aspect_ratio`: None or "square", "pad", "anyres".

        Raises:
            ValueError: for another value, or for sizes below one pixel.
        """
        if image_aspect_ratio not in _MODE_OF_ASPECT_RATIO:
            raise ValueError(f"image_aspect_ratio: found {image_aspect_ratio!r}, expected 'square', 'pad' or 'anyres'")
        width, height = (int(length) for length in original_wh)
        rows, cols = (int(count) for count in grid)
        return cls((width, height), side, _MODE_OF_ASPECT_RATIO[image_aspect_ratio], (rows, cols), shortest_edge)

    @property
    def axes(self) -> tuple[AxisMap, AxisMap]:
        """The exact integer maps of x and y."""
        output = self.side if self.processed_side is None else self.processed_side
        edge = output if self.shortest_edge is None else self.shortest_edge
        if self.mode == "squeeze":
            pads, canvases, resized = (0, 0), self.original_wh, (edge, edge)
        elif self.mode == "pad":
            longest = max(self.original_wh)
            pads, canvases, resized = square_padding_xy(self.original_wh), (longest, longest), (edge, edge)
        else:
            pads, canvases, resized = (0, 0), self.original_wh, shortest_edge_resized_wh(self.original_wh, edge)
        x, y = (AxisMap(*axis, cut=(axis[2] - output) // 2) for axis in zip(pads, canvases, resized, strict=True))
        return x, y

    @property
    def scale_xy(self) -> tuple[float, float]:
        """Model pixels per original pixel; the axes differ slightly, since resized lengths are whole pixels."""
        x, y = self.axes
        return x.resized / x.canvas, y.resized / y.canvas

    @property
    def offset_xy(self) -> tuple[float, float]:
        """Model coordinates of the original's top left corner: `model = original * scale + offset`."""
        x, y = self.axes
        return x.pad * x.resized / x.canvas - x.cut, y.pad * y.resized / y.canvas - y.cut

    def points_to_model(self, points_xy_px: Any) -> np.ndarray:
        """Original pixels `[..., 2]` -> model pixels `[..., 2]`; nothing is clipped."""
        return _pairs(points_xy_px, 2) * np.array(self.scale_xy) + np.array(self.offset_xy)

    def points_from_model(self, points_xy_model: Any) -> np.ndarray:
        """Model pixels `[..., 2]` -> original pixels `[..., 2]`; nothing is clipped."""
        return (_pairs(points_xy_model, 2) - np.array(self.offset_xy)) / np.array(self.scale_xy)

    def boxes_xyxy_to_model(self, boxes_xyxy_px: Any) -> np.ndarray:
        """Original pixels `[..., 4]` -> model pixels `[..., 4]`; nothing is clipped."""
        return _pairs(boxes_xyxy_px, 4) * np.tile(self.scale_xy, 2) + np.tile(self.offset_xy, 2)

    def boxes_xyxy_from_model(self, boxes_xyxy_model: Any) -> np.ndarray:
        """Model pixels `[..., 4]` -> original pixels `[..., 4]`; nothing is clipped."""
        return (_pairs(boxes_xyxy_model, 4) - np.tile(self.offset_xy, 2)) / np.tile(self.scale_xy, 2)

    def area_tables(self, grid: tuple[int, int] | None = None) -> AreaTables:
        """Overlap of original pixels with the cells of `grid` (the token grid if None)."""
        rows, cols = self.grid if grid is None else grid
        width, height = self.original_wh
        x, y = self.axes
        rows_before, cell_height = _axis_table(y, height, self.side, rows)
        cols_before, cell_width = _axis_table(x, width, self.side, cols)
        return AreaTables(rows_before, cols_before, cell_height * cell_width)

    def token_coverage(self, mask_hw: Any) -> np.ndarray:
        """Share of each token's cell that the transformed mask covers, by exact area.

        Args:
            mask_hw: `[..., height, width]` of the original image, 0 or 1 (or a share of each pixel).

        Returns:
            float64 `[..., rows, cols]`, 0..1. What lies outside the image counts as uncovered.

        Raises:
            ValueError: if the mask is not of the image's size.
        """
        return self._coverage(mask_hw, self.grid)

    def mask_to_model(self, mask_hw: Any) -> np.ndarray:
        """Share of each model pixel that the mask covers: `[..., height, width]` -> float64 `[..., side, side]`."""
        return self._coverage(mask_hw, (self.side, self.side))

    def _coverage(self, mask_hw: Any, grid: tuple[int, int]) -> np.ndarray:
        mask = np.asarray(mask_hw, dtype=np.float64)
        width, height = self.original_wh
        if mask.shape[-2:] != (height, width):
            hint = ", which is width and height swapped" if mask.shape[-2:] == (width, height) else ""
            raise ValueError(f"mask: found shape {mask.shape}{hint}; expected [..., height={height}, width={width}]")
        tables = self.area_tables(grid)
        rows_by_y = np.diff(tables.rows_before, axis=0).T  # [rows, height]
        cols_by_x = np.diff(tables.cols_before, axis=0).T  # [cols, width]
        area = rows_by_y @ mask @ cols_by_x.T  # [..., height, width] -> [..., rows, cols]
        return area / tables.cell_area


def _axis_table(axis: AxisMap, length: int, side: int, cells: int) -> tuple[np.ndarray, int]:
    """Length of each cell before each pixel, `[length + 1, cells]`, and a cell's length, in a common unit."""
    # In units of 1 / (cells * resized) original pixels every edge of a cell and of a pixel is a whole number.
    pixel = cells * axis.resized
    cell = side * axis.canvas
    first = axis.cut * cells * axis.canvas - axis.pad * pixel
    unit = math.gcd(pixel, cell, first)
    pixel, cell, first = pixel // unit, cell // unit, first // unit

    cell_starts = first + cell * np.arange(cells, dtype=np.float64)  # [cells]
    pixel_starts = pixel * np.arange(length + 1, dtype=np.float64)[:, None]  # [length + 1, 1]
    starts_in_image = np.maximum(cell_starts, 0)
    return np.clip(pixel_starts, starts_in_image, np.maximum(cell_starts + cell, 0)) - starts_in_image, cell


def _pairs(values: Any, size: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] != size:
        raise ValueError(f"coordinates: found shape {array.shape}, expected [..., {size}]")
    return array


def shortest_edge_resized_wh(original_wh: tuple[int, int], shortest_edge: int) -> tuple[int, int]:
    """Size after CLIP's processor resized the shortest edge; the longer one is truncated to whole pixels."""
    width, height = original_wh
    if width <= height:
        return shortest_edge, int(shortest_edge * height / width)
    return int(shortest_edge * width / height), shortest_edge


def square_padding_xy(original_wh: tuple[int, int]) -> tuple[int, int]:
    """Pixels to the left of and above an image on its square canvas; an odd remainder goes right or below."""
    width, height = original_wh
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2
