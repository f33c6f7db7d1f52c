"""Where a model's visual tokens look, from its config and processor alone: no weights are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoConfig

from patch_aligned.analysis.regions import SIZE_LIMITS_PX, SIZES
from patch_aligned.cells import Layout, TokenGrid
from patch_aligned.masks import areas_px, covered_tokens_of_grids
from patch_aligned.models.impulse import ImpulseResult, impulse_test
from patch_aligned.models.layouts import layouts_of
from patch_aligned.models.tiny import tiny_copy
from patch_aligned.models.tokens import PROJECTORS, image_token_id
from patch_aligned.models.whole import processor_of
from patch_aligned.pad import read_annotations

# Model pixels that a change spreads over: where images are resized three times, and where tokens are interpolated.
_BLUR_PX = {"Idefics3ImageProcessor": 9, "SmolVLMImageProcessor": 9, "LlavaOnevisionImageProcessor": 15}
_RECTANGLES = 6


@dataclass(frozen=True)
class Inspection:
    """What a model does with an image of one size."""

    model_type: str  # the family
    image_processor: str  # its class, which decides the layout
    decoder: str  # class of the module whose input has the visual tokens
    token_id: int  # stands for a visual token in `input_ids`
    projector: tuple[str, ...]  # names of its modules in the base model
    layout: Layout  # where the tokens look
    check: ImpulseResult  # the layout compared with a tiny random copy of the model


def inspect_model(model: str, image_wh: tuple[int, int]) -> Inspection:
    """Describe a model (folder or hub name), and check its layout of an image of this size.

    Only config, processor and tokenizer are read. Raises `ValueError` if its visual tokens have no place.
    """
    processor, config = processor_of(model), AutoConfig.from_pretrained(model)
    token_id = image_token_id(config)
    [layout] = layouts_of(processor, [image_wh])
    copy, name = tiny_copy(config), type(processor.image_processor).__name__
    blur = _BLUR_PX.get(name.removesuffix("Pil"), 3)
    return Inspection(
        model_type=config.model_type,
        image_processor=name,
        decoder=type(copy.get_decoder()).__name__,
        token_id=token_id,
        projector=PROJECTORS.get(config.model_type, ()),
        layout=layout,
        check=impulse_test(copy, processor, layout, blur=blur, rectangles=_RECTANGLES),
    )


def describe_grid(grid: TokenGrid) -> str:
    """Say in words how many cells a grid has, and how large they are."""
    cell_wh = (float(np.median(np.diff(edges))) for edges in (grid.x_edges, grid.y_edges))
    return f"{grid.kind}: {grid.rows} x {grid.cols} tokens of " + " x ".join(f"{side:.1f}" for side in cell_wh) + " px"


_PANEL, _LINE, _GAP = 640, 26, 12
_INK, _CELL, _FIRST = (32, 33, 36), (255, 64, 129), (255, 214, 10, 150)


def draw_cells(image: Image.Image, layout: Layout) -> Image.Image:
    """Draw the cells of each grid over the image, one panel a grid. The first token's cell is filled."""
    scale = min(_PANEL / max(image.size), 4.0)
    width, height = (round(side * scale) for side in image.size)
    sheet = Image.new("RGB", (len(layout.grids) * (width + _GAP) + _GAP, height + _LINE + 2 * _GAP), "white")
    for index, grid in enumerate(layout.grids):
        panel = image.convert("RGB").resize((width, height))
        draw = ImageDraw.Draw(panel, "RGBA")
        x, y = ([edge * scale for edge in edges] for edges in (grid.x_edges, grid.y_edges))
        row, col = np.unravel_index(np.argmin(grid.tokens), grid.shape)
        draw.rectangle((x[col], y[row], x[col + 1], y[row + 1]), fill=_FIRST)
        for edge in x:
            draw.line((edge, y[0], edge, y[-1]), fill=_CELL)
        for edge in y:
            draw.line((x[0], edge, x[-1], edge), fill=_CELL)
        left = _GAP + index * (width + _GAP)
        ImageDraw.Draw(sheet).text((left, _GAP), describe_grid(grid), font=ImageFont.load_default(15), fill=_INK)
        sheet.paste(panel, (left, _GAP + _LINE))
    return sheet


def coverage_of_models(
    models: Sequence[str],
    data: Path,
    min_coverage: float = 0.5,
    limit: int | None = None,
    on_images: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    """Return the share of regions that keep a token: a row for each model and kind of grid (`any` for all of them).

    Columns are `small`, `medium`, `large` and `all`. Only the processors of the models (folders or hub names) are read.
    """
    processors: dict[str, Any] = {model: processor_of(model) for model in models}
    rows: list[dict[str, Any]] = []
    for done, image in enumerate(islice(read_annotations(data), limit), start=1):
        rle_masks = [region.rle_mask for region in image.regions]
        if not image.regions:
            continue
        sizes = [SIZES[place] for place in np.searchsorted(SIZE_LIMITS_PX, areas_px(image.coco_masks()), side="right")]
        for model, processor in processors.items():
            [layout] = layouts_of(processor, [image.size_wh])
            kept: dict[str, np.ndarray] = {}
            name = f"{data}: {image.image_id}"
            of_grids = covered_tokens_of_grids(rle_masks, image.size_wh, layout.grids, min_coverage, name)
            for grid, covered in zip(layout.grids, of_grids, strict=True):
                for kind in (grid.kind, "any"):
                    kept[kind] = np.logical_or(kept.get(kind, False), covered.any(axis=1))
            rows += [
                {"model": model, "grid": kind, "size": size, "kept": keeps}
                for kind, of_kind in kept.items()
                for size, keeps in zip(sizes, of_kind.tolist(), strict=True)
            ]
        on_images(done)
    if not rows:
        raise ValueError(f"{data}: found no region; expected a PAD file with regions.")
    found = pd.DataFrame(rows)
    shares = found.pivot_table("kept", ["model", "grid"], "size", sort=False).reindex(columns=list(SIZES))
    return shares.assign(all=found.groupby(["model", "grid"])["kept"].mean())
