"""A picture of where labels are found: ground truth, then each projector's cosine map and prediction.

The layout of the paper's Figure 1 (left): one row an image and label, one pair of columns a projector.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from patch_aligned.analysis.figure_parts import bare, drawable, font_families

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUTH_COLOUR = "#12b886"
PREDICTION_COLOUR = "#f03e8a"
HEAT_MAP = "magma"
PANEL_INCHES = 1.55
_LONGEST_LABEL, _LONGEST_NAME = 20, 28  # characters that fit above one panel, and above two in bold type
_CHARACTER_INCHES = 0.066  # of the caption, on average and rather too wide


@dataclass(frozen=True)
class PictureCell:
    """What one projector made of one label.

    Attributes:
        image: `[3, side, side]`, 0..1, as its tower sees it.
        truth: `[side, side]`, share of each pixel that the region covers.
        cosine, predicted: `[rows, cols]`, of each visual token; predicted is bool.
        iou_px: by area; NaN without truth.
    """

    image: Tensor
    truth: Tensor
    cosine: Tensor
    predicted: Tensor
    iou_px: float


@dataclass(frozen=True)
class PictureRow:
    """One image and label with the maps of every projector.

    Attributes:
        image_id: as in the PAD file.
        label: the region's label.
        image, truth: as the first projector's tower sees them, see `PictureCell`.
        cells: by the projector's name.
    """

    image_id: str
    label: str
    image: Tensor
    truth: Tensor
    cells: dict[str, PictureCell] = field(default_factory=dict)


def save_localisation_figure(rows: Sequence[PictureRow], path: Path, rule: str) -> None:
    """Draws the rows and saves them as an image of the kind that the suffix names.

    Args:
        rows: what to show; all rows hold the same projectors.
        path: where the picture goes.
        rule: name of the threshold rule, for the caption.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("No row to draw: no image has a region.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: pip install 'patch-aligned-llava[analysis]'.") from error

    names = list(rows[0].cells)
    # A narrow empty column sets each projector's pair of panels apart.
    widths = [1.0] + [0.1, 1.0, 1.0] * len(names)
    width = PANEL_INCHES * sum(widths) + 0.3
    caption = textwrap.wrap(
        "Cosine: of each visual token with the label; colours run from the map's lowest value to its highest, both "
        f"written above it. Prediction: tokens above the threshold ({rule}).",
        int(width / _CHARACTER_INCHES),
    )
    label_inches, head_inches, foot_inches = 0.28, 0.55, 0.26 + 0.14 * len(caption)
    height = (PANEL_INCHES + label_inches) * len(rows) + head_inches + foot_inches
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    grid = figure.add_gridspec(
        len(rows),
        len(widths),
        width_ratios=widths,
        left=0.15 / width,
        right=1 - 0.15 / width,
        top=1 - (head_inches + label_inches) / height,
        bottom=foot_inches / height,
        wspace=0.06,
        hspace=label_inches / PANEL_INCHES,
    )
    for row_index, row in enumerate(rows):
        truth_axes = figure.add_subplot(grid[row_index, 0])
        _draw_truth(truth_axes, row)
        title = drawable(row.label, _LONGEST_LABEL)
        truth_axes.set_title(title, fontsize=9.5, pad=3, color="#212529", family=font_families(), parse_math=False)
        pairs: list[tuple[Axes, Axes]] = []
        for index, name in enumerate(names):
            heat_axes, mask_axes = (figure.add_subplot(grid[row_index, 3 * index + 2 + offset]) for offset in (0, 1))
            _draw_heat(heat_axes, row.cells[name])
            _draw_prediction(mask_axes, row.cells[name])
            pairs.append((heat_axes, mask_axes))
        if row_index == 0:
            first = "ground truth" if any(row.truth.any() for row in rows) else "image"
            _head_columns(figure, truth_axes, first, dict(zip(names, pairs, strict=True)), head_inches / height)
    figure.text(
        0.5,
        0.12 / height,
        "\n".join(caption),
        ha="center",
        va="bottom",
        fontsize=8,
        color="#495057",
    )
    figure.savefig(path)


def panel_jpegs(row: PictureRow) -> dict[str | tuple[str, str], bytes]:
    """The panels of a row, each a JPEG of its own: `truth`, and for each projector `(name, cosine)` and `prediction`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    found: dict[str | tuple[str, str], bytes] = {"truth": _panel_jpeg(partial(_draw_truth, row=row))}
    for name, cell in row.cells.items():
        found[name, "cosine"] = _panel_jpeg(partial(_draw_heat, cell=cell))
        found[name, "prediction"] = _panel_jpeg(partial(_draw_prediction, cell=cell))
    return found


def _panel_jpeg(draw: Callable[[Axes], None]) -> bytes:
    """What `draw` draws, filling the picture; titles fall outside."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL_INCHES, PANEL_INCHES), dpi=200)
    draw(figure.add_axes((0, 0, 1, 1)))
    content = io.BytesIO()
    figure.savefig(content, format="jpeg", pil_kwargs={"quality": 85})
    return content.getvalue()


def _head_columns(figure: Any, truth_axes: Axes, first: str, pairs: dict[str, tuple[Axes, Axes]], head: float) -> None:
    """Names the columns above the first row: the projector over its pair, the kind of panel over each."""
    top = truth_axes.get_position().y1
    for axes, kind in [(truth_axes, first)] + [
        (axes, kind) for pair in pairs.values() for axes, kind in zip(pair, ("cosine", "prediction"), strict=True)
    ]:
        place = axes.get_position()
        figure.text((place.x0 + place.x1) / 2, top + 0.52 * head, kind, ha="center", fontsize=8.5, color="#495057")
    for name, (left, right) in pairs.items():
        start, end = left.get_position().x0, right.get_position().x1
        figure.text(
            (start + end) / 2, top + 0.86 * head, drawable(name, _LONGEST_NAME),
            ha="center", fontsize=11, fontweight="bold", family=font_families(), parse_math=False,
        )  # fmt: skip


def _draw_truth(axes: Axes, row: PictureRow) -> None:
    bare(axes)
    axes.imshow(row.image.numpy().transpose(1, 2, 0))
    _outline(axes, row.truth.numpy(), TRUTH_COLOUR)


def _draw_heat(axes: Axes, cell: PictureCell) -> None:
    bare(axes)
    cosine = cell.cosine.numpy()
    side = cell.truth.shape[0]
    axes.imshow(cosine, cmap=HEAT_MAP, extent=(-0.5, side - 0.5, side - 0.5, -0.5), interpolation="nearest")
    _outline(axes, cell.truth.numpy(), "black", width=0.6)
    axes.set_title(f"{cosine.min():.2f} … {cosine.max():.2f}".replace("-", "−"), fontsize=8.5, pad=3, color="#495057")


def _draw_prediction(axes: Axes, cell: PictureCell) -> None:
    bare(axes)
    predicted = _cells_to_pixels(cell.predicted.numpy().astype(float), cell.truth.shape[0])
    axes.imshow(_dimmed(cell.image, predicted))
    _outline(axes, predicted, PREDICTION_COLOUR)
    axes.set_title(
        "no truth given" if np.isnan(cell.iou_px) else f"IoU {cell.iou_px:.2f}", fontsize=8.5, pad=3, color="#212529"
    )


def _dimmed(picture: Tensor, mask: np.ndarray) -> np.ndarray:
    """The image, its colours washed out where the mask is not: `[side, side, 3]`."""
    image = picture.numpy().transpose(1, 2, 0)  # [3, side, side] -> [side, side, 3]
    grey = image.mean(axis=2, keepdims=True)
    washed = 0.12 * image + 0.24 * grey + 0.58
    return mask[..., None] * image + (1 - mask[..., None]) * washed


def _cells_to_pixels(cells: np.ndarray, side: int) -> np.ndarray:
    """Each pixel takes the value of the cell that its centre lies in: `[rows, cols]` -> `[side, side]`."""
    rows, cols = ((2 * np.arange(side) + 1) * count // (2 * side) for count in cells.shape)
    return cells[rows[:, None], cols[None, :]]


def _outline(axes: Axes, mask: np.ndarray, colour: str, width: float = 1.3) -> None:
    framed = np.pad(mask, 1)  # so that the outline also runs along the image's edge
    places = np.arange(-1, mask.shape[0] + 1)
    if framed.max() >= 0.5:
        # A white rim keeps the line visible on an image of its own colour.
        for line_colour, line_width in (("white", width + 1.6), (colour, width)):
            axes.contour(places, places, framed, levels=[0.5], colors=[line_colour], linewidths=line_width)
    axes.set_xlim(-0.5, mask.shape[1] - 0.5)
    axes.set_ylim(mask.shape[0] - 0.5, -0.5)
