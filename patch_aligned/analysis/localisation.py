"""A picture of where labels are found: ground truth, then each projector's cosine map and prediction.

The layout of the paper's Figure 1 (left): one row an image and label, one pair of columns a projector.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llava.mm_utils import load_rgb_image
from patch_aligned.analysis.alignment import cosine_maps, iou_by_area, predicted_tokens
from patch_aligned.cells import TokenGrid
from patch_aligned.masks import rle_of_mask, token_coverage_of_regions
from patch_aligned.models.base import VisionLanguageModel, tokens_of_image
from patch_aligned.models.load import load_models

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Shared by the pictures. Draw labels and names with `parse_math=False`, or matplotlib reads what is between two dollar
# signs as a formula.

MISSING = "▯"
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans", "Arial Unicode MS")


def require_matplotlib() -> None:
    """Raise `ImportError` if matplotlib is not installed, without which no picture can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Pictures need matplotlib: pip install 'patch-aligned-llava[analysis]'.")


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
    """Remove ticks and frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


TRUTH_COLOUR = "#12b886"
PREDICTION_COLOUR = "#f03e8a"
HEAT_MAP = "magma"
PANEL_INCHES = 1.55
_LONGEST_LABEL, _LONGEST_NAME = 20, 28  # characters that fit above one panel, and above two in bold type
_CHARACTER_INCHES = 0.066  # of the caption, on average and rather too wide


@dataclass(frozen=True)
class PictureCell:
    """Where one model finds one label."""

    grid: TokenGrid
    cosine: Tensor  # [rows, cols], of each visual token
    predicted: Tensor  # [rows, cols], bool
    iou_px: float  # by area; NaN without truth


@dataclass(frozen=True)
class PictureRow:
    """One image and label with the maps of every model, by its name."""

    image_id: str
    label: str
    image: np.ndarray  # uint8 [height, width, 3], the image file
    truth: np.ndarray  # bool [height, width], the region
    cells: dict[str, PictureCell] = field(default_factory=dict)


def save_localisation_figure(rows: Sequence[PictureRow], path: Path, rule: str) -> None:
    """Draw the rows and save them as an image of the kind that the suffix names.

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
    require_matplotlib()
    from matplotlib.figure import Figure

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

    def head(panels: Sequence[Axes], text: str, share: float = 0.52, **style: Any) -> None:
        """Write a heading above panels of the first row, so high in the space for headings."""
        first, last = panels[0].get_position(), panels[-1].get_position()
        style = {"fontsize": 8.5, "color": "#495057", **style}
        figure.text((first.x0 + last.x1) / 2, first.y1 + share * head_inches / height, text, ha="center", **style)

    for row_index, row in enumerate(rows):
        truth_axes = figure.add_subplot(grid[row_index, 0])
        _draw_truth(truth_axes, row)
        title = drawable(row.label, _LONGEST_LABEL)
        truth_axes.set_title(title, fontsize=9.5, pad=3, color="#212529", family=font_families(), parse_math=False)
        if row_index == 0:
            head([truth_axes], "ground truth" if any(row.truth.any() for row in rows) else "image")
        for index, name in enumerate(names):
            heat_axes, mask_axes = (figure.add_subplot(grid[row_index, 3 * index + 2 + offset]) for offset in (0, 1))
            _draw_heat(heat_axes, row, row.cells[name])
            _draw_prediction(mask_axes, row, row.cells[name])
            if row_index == 0:
                head([heat_axes], "cosine")
                head([mask_axes], "prediction")
                bold = {"fontsize": 11, "fontweight": "bold", "color": "black", "family": font_families()}
                head([heat_axes, mask_axes], drawable(name, _LONGEST_NAME), 0.86, parse_math=False, **bold)
    figure.text(0.5, 0.12 / height, "\n".join(caption), ha="center", va="bottom", fontsize=8, color="#495057")
    figure.savefig(path)


def panel_jpegs(row: PictureRow) -> dict[str | tuple[str, str], bytes]:
    """The panels of a row, a JPEG each: `truth`, and for each projector `(name, cosine)` and `(name, prediction)`."""
    found: dict[str | tuple[str, str], bytes] = {"truth": place_jpeg(row)}
    for name, cell in row.cells.items():
        found[name, "cosine"] = place_jpeg(row, cell)
        found[name, "prediction"] = _jpeg_of(_draw_prediction, row, cell=cell)
    return found


def place_jpeg(row: PictureRow, cell: PictureCell | None = None) -> bytes:
    """The image, or a model's cosine map over it, with the region's outline."""
    return _jpeg_of(_draw_heat, row, cell=cell) if cell else _jpeg_of(_draw_truth, row)


def _jpeg_of(draw: Callable[..., None], row: PictureRow, **what: Any) -> bytes:
    height, width = row.truth.shape
    size_inches = (PANEL_INCHES * width / max(width, height), PANEL_INCHES * height / max(width, height))

    def draw_image_alone(axes: Axes) -> None:
        draw(axes, row=row, **what)
        axes.set(xlim=(0, width), ylim=(height, 0))

    return panel_jpeg(draw_image_alone, size_inches)


def panel_jpeg(draw: Callable[[Axes], None], size_inches: tuple[float, float]) -> bytes:
    """A JPEG filled with what `draw` draws; titles fall outside."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, dpi=200)
    draw(figure.add_axes((0, 0, 1, 1)))
    content = io.BytesIO()
    figure.savefig(content, format="jpeg", pil_kwargs={"quality": 85})
    return content.getvalue()


def _draw_truth(axes: Axes, row: PictureRow) -> None:
    axes.imshow(row.image, extent=_extent(row))
    _outline(axes, row.truth, TRUTH_COLOUR)
    _show_whole_image(axes, row)


def _draw_heat(axes: Axes, row: PictureRow, cell: PictureCell) -> None:
    cosine = cell.cosine.numpy()
    height, width = row.truth.shape
    axes.fill_between((0, width), 0, height, color="#e9ecef", linewidth=0)  # parts of the image that no token sees
    axes.pcolormesh(cell.grid.x_edges, cell.grid.y_edges, cosine, cmap=HEAT_MAP)
    _outline(axes, row.truth, "black", width=0.6)
    _show_whole_image(axes, row)
    axes.set_title(f"{cosine.min():.2f} … {cosine.max():.2f}".replace("-", "−"), fontsize=8.5, pad=3, color="#495057")


def _draw_prediction(axes: Axes, row: PictureRow, cell: PictureCell) -> None:
    predicted = _cells_to_pixels(cell.predicted.numpy(), cell.grid)
    axes.imshow(_dimmed(row.image, predicted), extent=_extent(row))
    _outline(axes, predicted, PREDICTION_COLOUR)
    _show_whole_image(axes, row)
    axes.set_title(
        "no truth given" if np.isnan(cell.iou_px) else f"IoU {cell.iou_px:.2f}", fontsize=8.5, pad=3, color="#212529"
    )


def _extent(row: PictureRow) -> tuple[float, float, float, float]:
    """Left, right, bottom, top: continuous pixels of the image, y downwards."""
    height, width = row.truth.shape
    return 0, width, height, 0


def _show_whole_image(axes: Axes, row: PictureRow) -> None:
    """The image from edge to edge, centred in a square panel, whatever its shape."""
    height, width = row.truth.shape
    side = max(height, width)
    bare(axes)
    axes.set(xlim=((width - side) / 2, (width + side) / 2), ylim=((height + side) / 2, (height - side) / 2))
    axes.set_aspect("equal")


def _dimmed(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image 0..1, its colours washed out where the mask is not: `[height, width, 3]`."""
    image = image / 255
    grey = image.mean(axis=2, keepdims=True)
    washed = 0.12 * image + 0.24 * grey + 0.58
    return np.where(mask[..., None], image, washed)


def _cells_to_pixels(cells: np.ndarray, grid: TokenGrid) -> np.ndarray:
    """Each pixel of the image takes the value of the cell that its centre lies in: bool `[height, width]`."""
    width, height = grid.image_wh
    under = grid.cells_under(np.arange(width) + 0.5, np.arange(height) + 0.5)  # [height, width]
    return cells.ravel()[under] & (under >= 0)


def _outline(axes: Axes, mask: np.ndarray, colour: str, width: float = 1.3) -> None:
    framed = np.pad(mask.astype(float), 1)  # so that the outline also runs along the image's edge
    rows, cols = (np.arange(length) - 0.5 for length in framed.shape)
    if framed.any():
        # A white rim keeps the line visible on an image of its own colour.
        for line_colour, line_width in (("white", width + 1.6), (colour, width)):
            axes.contour(cols, rows, framed, levels=[0.5], colors=[line_colour], linewidths=line_width)


# Where labels are found in an image: the cosine map and the predicted tokens of each projector (Figures 1 and 4).


def localise(
    models: Sequence[VisionLanguageModel] | Sequence[str],
    image: Path | str,
    label: str,
    mask: np.ndarray | None = None,
    threshold_rule: str = "mid_range",
    *,
    base: str | None = None,
    save: Path | str | None = None,
) -> PictureRow:
    """Where each model finds a label in an image; `save_localisation_figure` draws what it returns.

    Args:
        models: what is compared: loaded models, or `NAME=PATH` of each as `load_models` takes them.
        image: the file.
        label: any text.
        mask: `[height, width]`, the region that the label is about; None where there is no truth, and the IoU is NaN.
        threshold_rule: which tokens of the cosine map are the prediction.
        base: with paths: the LLM of LLaVA's projectors.
        save: where the figure goes, such as `rabbit.png`; None draws none.

    Raises:
        OSError: the image is missing or broken, or there is no such model.
        ValueError: the mask is not of the image's size, the rule needs one, or the label has no token.
    """
    opened = load_rgb_image(image)
    height_width = opened.size[::-1]
    if mask is None and threshold_rule == "top_area":
        raise ValueError("The rule 'top_area' is told the region's size: pass a mask, or choose another rule.")
    truth = np.zeros(height_width, dtype=bool) if mask is None else np.asarray(mask) != 0
    if truth.shape != height_width:
        raise ValueError(f"{image}: the mask is {list(truth.shape)}; expected the image's {list(height_width)}.")
    rle_mask = rle_of_mask(truth)
    places = [model for model in models if isinstance(model, str)]
    loaded = load_models(places, base) if places else []
    loaded += [model for model in models if not isinstance(model, str)]
    cells = {}
    for model, tokens, grid in tokens_of_image(loaded, opened):  # [T, D]
        coverage = torch.from_numpy(token_coverage_of_regions([rle_mask], opened.size, grid)[0])  # [rows, cols]
        direction = model.words.directions_of_labels([label])[0].to(tokens)  # [D]
        cells[model.name] = picture_cell(grid, direction, tokens, coverage.to(tokens.device), threshold_rule)
    found = PictureRow(Path(image).name, label, np.asarray(opened), truth, cells)
    if save is not None:
        save_localisation_figure([found], Path(save), threshold_rule)
    return found


def picture_cell(
    grid: TokenGrid, direction: Tensor, visual_tokens: Tensor, coverage: Tensor, rule: str, positive: bool = False
) -> PictureCell:
    """Compare a label `[D]` with the visual tokens `[T, D]` of one model on a grid, of which the region covers shares.

    Coverage is `[rows, cols]`; for `rule` and `positive` see `predicted_tokens`.
    """
    maps = cosine_maps(direction[None], visual_tokens[grid.tokens.ravel()])  # [1, S]
    areas = coverage.double().reshape(1, -1)  # [rows, cols] -> [1, S]
    predicted = predicted_tokens(maps, rule, areas.sum(dim=1), positive)  # [1, S]
    return PictureCell(
        grid=grid,
        cosine=maps.reshape(coverage.shape).cpu(),
        predicted=predicted.reshape(coverage.shape).cpu(),
        iou_px=float(iou_by_area(predicted, areas)),
    )


def map_difference(one: PictureCell, other: PictureCell) -> tuple[TokenGrid, Tensor]:
    """Return `one` less `other`, two models' cosine maps, where both look: `[rows, cols]` between the edges of both."""
    x_edges = _common_edges(one.grid.x_edges, other.grid.x_edges)
    y_edges = _common_edges(one.grid.y_edges, other.grid.y_edges)
    x, y = ((np.array(edges[:-1]) + np.array(edges[1:])) / 2 for edges in (x_edges, y_edges))  # centres
    values, subtracted = (cell.cosine.ravel()[torch.from_numpy(cell.grid.cells_under(x, y))] for cell in (one, other))
    return TokenGrid(one.grid.image_wh, x_edges, y_edges), values - subtracted


def _common_edges(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    """Edges of either, where both reach."""
    low, high = max(one[0], other[0]), min(one[-1], other[-1])
    return tuple(sorted({round(edge, 6) for edge in (*one, *other) if low <= edge <= high}))
