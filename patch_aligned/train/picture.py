"""Draw a batch: each image file with its masks, beside the tower's input with the covered tokens.

Wrong masks show on the left, wrong tokens on the right. The right picture is made from the pixels that the tower was
given, so it also reveals a wrong layout.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from torch import Tensor

_PANEL = 420  # side of one of the two pictures of an image, pixels
_GAP = 16
_TEXT = 17
_LINE = 25
_LEGEND_COLUMNS = 2
_MOST_IMAGES = 8
_MOST_LABELS = 12
_INK, _FADED, _PAPER = (32, 33, 36), (150, 152, 156), (255, 255, 255)
_GOLDEN_ANGLE = 0.381966  # of the colour circle: any number of hues, neighbours far apart


@dataclass(frozen=True)
class PicturedRegion:
    """A region: its label as the LLM reads it, its mask, and the tokens it covers (None if it is not in the loss)."""

    label: str
    rle_mask: str
    tokens: np.ndarray | None


@dataclass(frozen=True)
class PicturedImage:
    """One image with its regions: the file, if readable, and the tower's input `[3, height, width]` in 0..1.

    `edges` are those of the cells along x and y, in 0..1 of the tower's input; None if all cells are equal.
    """

    original: Image.Image | None
    model_image: Tensor
    title: str
    regions: Sequence[PicturedRegion]
    edges: tuple[np.ndarray, np.ndarray] | None = None


def save_picture(images: Sequence[PicturedImage], grid: tuple[int, int] | None, path: Path) -> Path:
    """Draw the first images of a batch and save them as `path`.png; returns the file's path.

    `grid` is rows and columns of visual tokens; None if images have edges of their own.
    """
    font = ImageFont.load_default(_TEXT)
    blocks = [_draw_block(image, grid, font) for image in images[:_MOST_IMAGES]]
    columns = 2 if len(blocks) > 1 else 1
    lines = [blocks[start : start + columns] for start in range(0, len(blocks), columns)]
    heights = [max(block.height for block in line) for line in lines]
    width = columns * (2 * _PANEL + 3 * _GAP) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + 2 * _GAP + _LINE), _PAPER)
    ImageDraw.Draw(sheet).text((2 * _GAP, _GAP), _caption(len(images), grid), font=font, fill=_FADED)
    top = 2 * _GAP + _LINE
    for line, height in zip(lines, heights, strict=True):
        for column, block in enumerate(line):
            sheet.paste(block, (_GAP + column * (2 * _PANEL + 3 * _GAP), top))
        top += height
    path = path.with_name(f"{path.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _caption(images: int, grid: tuple[int, int] | None) -> str:
    if not images:
        return "A batch without images"
    shown = f", the first {_MOST_IMAGES} of {images} images" if images > _MOST_IMAGES else ""
    tokens = "Visual tokens" if grid is None else f"{grid[0]} x {grid[1]} visual tokens"
    return f"{tokens}{shown}.   Left: the image with its masks.   Right: what the tower sees, and the covered tokens."


def _draw_block(
    image: PicturedImage, grid: tuple[int, int] | None, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Image.Image:
    """Draw the title, the two pictures side by side, and the legend."""
    entries = min(len(image.regions), _MOST_LABELS + 1)
    legend_lines = -(-entries // _LEGEND_COLUMNS)
    width = 2 * _PANEL + _GAP
    block = Image.new("RGB", (width + 2 * _GAP, _LINE + _PANEL + _GAP + legend_lines * _LINE + _GAP), _PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((_GAP, 0), _shortened(image.title, width, font), font=font, fill=_INK)
    if image.original is not None:
        masked = _draw_masks(image.original, image.regions)
        block.paste(masked, (_GAP + (_PANEL - masked.width) // 2, _LINE + (_PANEL - masked.height) // 2))
    seen = (image.model_image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)  # -> [height, width, 3]
    rows, cols = grid or (1, 1)
    edges = image.edges or (np.linspace(0, 1, cols + 1), np.linspace(0, 1, rows + 1))
    block.paste(_draw_tokens(Image.fromarray(seen), image.regions, *edges), (_GAP + _PANEL + _GAP, _LINE))

    for index, region in enumerate(image.regions[: _MOST_LABELS + 1]):
        left = _GAP + (index % _LEGEND_COLUMNS) * (_PANEL + _GAP)
        top = _LINE + _PANEL + _GAP // 2 + (index // _LEGEND_COLUMNS) * _LINE
        if index == _MOST_LABELS:
            draw.text((left, top), f"and {len(image.regions) - _MOST_LABELS} more", font=font, fill=_FADED)
            continue
        is_used = region.tokens is not None
        box_xyxy_px, colour = (left, top + 3, left + 26, top + 19), _colour(index)
        draw.rounded_rectangle(box_xyxy_px, 4, fill=colour if is_used else None, outline=colour, width=2)
        covers = "covers no token, not in the loss"
        if region.tokens is not None:
            count = int(region.tokens.sum())
            covers = f"{count} token{'' if count == 1 else 's'}"
        text = _shortened(f"{region.label}  ({covers})", _PANEL - 40, font)
        draw.text((left + 34, top), text, font=font, fill=_INK if is_used else _FADED)
    return block


def _draw_masks(original: Image.Image, regions: Sequence[PicturedRegion]) -> Image.Image:
    """Scale the image to the panel, and tint and outline each region."""
    scale = _PANEL / max(original.size)
    width, height = (max(1, round(length * scale)) for length in original.size)
    size = (width, height)
    tinted = np.asarray(original.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    for index, region in enumerate(regions[:_MOST_LABELS]):
        mask = coco_mask.decode({"size": list(original.size[::-1]), "counts": region.rle_mask.encode()})
        scaled = Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BOX)
        inside = np.asarray(scaled) >= 0.5
        colour = np.array(_colour(index), dtype=np.float64)
        tinted[inside] = 0.62 * tinted[inside] + 0.38 * colour
        tinted[_outline(inside)] = colour
    return Image.fromarray(tinted.round().astype(np.uint8))


def _draw_tokens(
    seen: Image.Image, regions: Sequence[PicturedRegion], x_edges01: np.ndarray, y_edges01: np.ndarray
) -> Image.Image:
    """Draw the token grid over the faded image. A cell covered by several regions has their colours as stripes."""
    width, height = (max(1, round(_PANEL * side / max(seen.size))) for side in seen.size)
    faded = seen.convert("L").convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    picture = Image.blend(faded, Image.new("RGB", faded.size, _PAPER), 0.55)
    sides = ((x_edges01, width), (y_edges01, height))
    x_edges, y_edges = ((edges * side).round(6).round().astype(int) for edges, side in sides)
    rows, cols = len(y_edges) - 1, len(x_edges) - 1
    overlay = picture.copy()
    draw = ImageDraw.Draw(overlay)
    shown = [(index, region.tokens) for index, region in enumerate(regions[:_MOST_LABELS])]
    for token in range(rows * cols):
        covering = [index for index, tokens in shown if tokens is not None and tokens[token]]
        left, right = x_edges[token % cols], x_edges[token % cols + 1]
        top, bottom = y_edges[token // cols], y_edges[token // cols + 1]
        stripes = np.linspace(left, right, len(covering) + 1).round().astype(int)
        for index, start, end in zip(covering, stripes[:-1], stripes[1:], strict=True):
            draw.rectangle((start, top, end - 1, bottom - 1), fill=_colour(index))
    picture = Image.blend(picture, overlay, 0.8)
    lines = ImageDraw.Draw(picture)
    for edge in x_edges[:-1].tolist():
        lines.line((edge, 0, edge, height), fill=_PAPER)
    for edge in y_edges[:-1].tolist():
        lines.line((0, edge, width, edge), fill=_PAPER)
    return picture


def _outline(inside: np.ndarray) -> np.ndarray:
    """Return the mask's pixels within two pixels of its border."""
    core = inside.copy()
    for _ in range(2):
        padded = np.pad(core, 1)
        core = core & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def _colour(index: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb((0.58 + index * _GOLDEN_ANGLE) % 1, 0.48, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    shown, end = text, ""
    while shown and font.getlength(shown + end) > width:
        shown, end = shown[:-1], "..."
    return shown + end
