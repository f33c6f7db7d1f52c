"""Rules that place the visual tokens of transformers' models on the original image, by class of image processor.

A rule lists the views of an image in the order of their tokens: the whole image, tiles of a canvas, crops. Sizes in
pixels come from functions of the image processor's own module, whichever release of transformers is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from patch_aligned.cells import Layout, TokenGrid, seen_box_xyxy_px, square_padding_xy

Size = tuple[int, int]
Kind = Literal["whole", "tiles", "crop"]
Resized = tuple[Size, Size, int]


class Settings:
    """Settings of a processor that decide where its tokens look. Equal settings have equal layouts.

    `processor` knows how many tokens a tile has; `module`, that of the image processor's class, computes sizes.
    """

    def __init__(self, processor: Any, image_processor: Any, module: Any):
        self.processor, self.image_processor, self.module = processor, image_processor, module
        defaults = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {}).get("images_kwargs", {})
        self.values = vars(image_processor) | defaults | getattr(processor, "images_kwargs", {})
        plain = {name: value for name, value in vars(processor).items() if isinstance(value, int | float | str)}
        plain.pop("chat_template", None)
        self._key = (type(processor), type(image_processor), repr(plain), repr(self.values))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "values":
            raise AttributeError(name)
        return self.values[name] if name in self.values else getattr(self.image_processor, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def side(self) -> int:
        """Side of the square that a tile, or the whole image, is resized to."""
        size = dict(self.size)
        return size.get("height") or size["shortest_edge"]

    def tokens_per_side(self) -> int:
        """Return the side of the grid of a square tile, from the number of tokens the processor gives it."""
        for name in ("image_seq_length", "image_seq_len", "num_image_tokens"):
            for holder in (self.processor, self.image_processor):
                if tokens := getattr(holder, name, None):
                    return math.isqrt(tokens)
        raise ValueError(
            f"{type(self.processor).__name__}: found no number of tokens for an image, expected its attribute "
            "image_seq_length. Pass the processor that AutoProcessor loads for the model."
        )


Rule = Callable[[Settings, Size, int], Layout]
"""Settings, the size of an image in pixels, the number of images in its sample -> layout."""


@dataclass(frozen=True)
class View:
    """A grid of tokens before it is placed on the image."""

    x: Sequence[float]  # [cols + 1] edges, in pixels of the original image
    y: Sequence[float]  # [rows + 1]
    tiles: Size = (1, 1)  # rows and columns of tiles that the grid consists of; tokens run tile by tile
    kind: Kind = "whole"
    row_ends: int = 0  # tokens after each row that have no place, such as `image_newline`


def layout_of_views(image_wh: Size, views: Sequence[View], before: int = 0) -> Layout:
    """Number the tokens of all views in order, after `before` tokens that have no place."""
    grids = []
    for view in views:
        (tile_rows, tile_cols), rows, cols = view.tiles, len(view.y) - 1, len(view.x) - 1
        shape = (tile_rows, tile_cols, rows // tile_rows, cols // tile_cols + view.row_ends)
        tokens = before + np.arange(math.prod(shape)).reshape(shape)[..., : cols // tile_cols]
        tokens = tokens.transpose(0, 2, 1, 3).reshape(rows, cols)  # [tile rows, tile cols, r, c] -> [rows, cols]
        grids.append(TokenGrid(image_wh, tuple(view.x), tuple(view.y), tokens, view.kind))
        before += math.prod(shape)
    return Layout(tuple(grids), before)


def spread(start: float, stop: float, cells: int) -> list[float]:
    """Return the edges of equal cells."""
    return [start + (stop - start) * cell / cells for cell in range(cells + 1)]


def whole(image_wh: Size, rows: int, cols: int, seen: float = 1.0) -> View:
    """View the whole image, squeezed. Patches cover the share `seen` of each edge."""
    return View(spread(0, image_wh[0] * seen, cols), spread(0, image_wh[1] * seen, rows))


def tiles(image_wh: Size, tile_rows: int, tile_cols: int, rows: int, cols: int) -> View:
    """View the whole image squeezed to a canvas of tiles, each with `rows` x `cols` tokens."""
    x, y = spread(0, image_wh[0], tile_cols * cols), spread(0, image_wh[1], tile_rows * rows)
    return View(x, y, (tile_rows, tile_cols), "tiles" if tile_rows * tile_cols > 1 else "whole")


# Rule 1: the whole image, resized to a grid that follows its shape.


def dynamic_grid(resize: Callable[[Settings, int, int], Resized]) -> Rule:
    """Make the rule of a processor that resizes an image, and pads it right and below.

    `resize` returns height and width after resizing and after padding, and the side of a token's cell, in pixels of the
    model.
    """

    def rule(settings: Settings, image_wh: Size, images: int) -> Layout:
        width, height = image_wh
        (resized_height, resized_width), (padded_height, padded_width), cell = resize(settings, height, width)
        x = spread(0, width * padded_width / resized_width, padded_width // cell)
        y = spread(0, height * padded_height / resized_height, padded_height // cell)
        return layout_of_views(image_wh, [View(x, y)])

    return rule


def _qwen(settings: Settings, height: int, width: int) -> Resized:
    cell = settings.patch_size * settings.merge_size
    resized = settings.module.smart_resize(height, width, cell, *_pixels(settings))
    return resized, resized, cell


def _glm(settings: Settings, height: int, width: int) -> Resized:
    cell, frames = settings.patch_size * settings.merge_size, settings.temporal_patch_size
    resized = settings.module.smart_resize(frames, height, width, frames, cell, *_pixels(settings))
    return resized, resized, cell


def _pixels(settings: Settings) -> tuple[int, int]:
    return settings.size["shortest_edge"], settings.size["longest_edge"]  # pixels, in spite of the names


def _kimi(settings: Settings, height: int, width: int) -> Resized:
    patch, merge, longest = settings.patch_size, settings.merge_size, settings.size["max_height"]
    resized, padded = settings.module.navit_resize(height, width, patch, merge, settings.max_patches, longest)
    return resized, padded, patch * merge


def _gemma4(settings: Settings, height: int, width: int) -> Resized:
    patch, pooled = settings.patch_size, settings.pooling_kernel_size
    most = settings.max_soft_tokens * pooled**2
    resized = settings.module.get_aspect_ratio_preserving_size(height, width, patch, most, pooled)
    return resized, resized, patch * pooled


def _pixtral(settings: Settings, height: int, width: int) -> Resized:
    cell = settings.processor.patch_size * settings.processor.spatial_merge_size
    blank = np.broadcast_to(np.uint8(0), (height, width, 3))  # the function reads a size off an image
    longest = settings.size["longest_edge"]
    resized = settings.module.get_resize_output_image_size(blank, (longest, longest), (cell, cell))
    return resized, resized, cell


# Rule 2: one square.


def square(settings: Settings, image_wh: Size, images: int) -> Layout:
    """Squeeze an image to a square, crop the centre of it, or pad it: what LLaVA's and SigLIP's processors do."""
    size, crop = dict(settings.size), settings.crop_size if settings.do_center_crop else None
    side = crop["height"] if crop else settings.side
    patch = getattr(settings.processor, "patch_size", None)
    cells = side // patch if patch else settings.tokens_per_side()
    seen = (patch or side // cells) * cells
    treatment: Any = "pad" if getattr(settings, "do_pad", False) else "squeeze" if "height" in size else "crop"
    if treatment == "crop" and crop is None:
        raise ValueError(
            f"{type(settings.image_processor).__name__}: found size {size} without do_center_crop, so images of one "
            "batch have several shapes; expected a height and a width, or a centre crop."
        )
    left, top, right, bottom = seen_box_xyxy_px(image_wh, treatment, settings.side, side, seen)
    strategy = getattr(settings.processor, "vision_feature_select_strategy", "full")
    before = getattr(settings.processor, "num_additional_image_tokens", 0) - (strategy == "default")  # CLS, registers
    return layout_of_views(image_wh, [View(spread(left, right, cells), spread(top, bottom, cells))], before)


def letterboxed_square(settings: Settings, image_wh: Size, images: int) -> Layout:
    """Resize the longest edge, then pad to a square in the middle: DeepSeek-VL's processors."""
    side, cells = settings.side, settings.tokens_per_side()
    resized = [max(round(edge * side / max(image_wh)), settings.min_size) for edge in image_wh]
    canvas = max(resized)
    x, y = (
        spread(-(pad := (canvas - scaled) // 2) * edge / scaled, (canvas - pad) * edge / scaled, cells)
        for edge, scaled in zip(image_wh, resized, strict=True)
    )
    return layout_of_views(image_wh, [View(x, y)])


# Rule 3: the whole image squeezed to a canvas of tiles, and a thumbnail.


def got_ocr2(settings: Settings, image_wh: Size, images: int) -> Layout:
    """Tiles, thumbnail last: InternVL and Aya Vision."""
    processor = settings.processor
    cells = processor.img_size // processor.patch_size if hasattr(processor, "img_size") else settings.tokens_per_side()
    return _tiles_and_thumbnail(settings, image_wh, cells)


def cohere2(settings: Settings, image_wh: Size, images: int) -> Layout:
    """Tiles, thumbnail last. `patch_size` is the number of tokens along a tile's side."""
    return _tiles_and_thumbnail(settings, image_wh, settings.patch_size)


def _tiles_and_thumbnail(settings: Settings, image_wh: Size, cells: int) -> Layout:
    rows = cols = 1
    if settings.crop_to_patches:
        tile = settings.size["height"], settings.size["width"]
        most = settings.min_patches, settings.max_patches
        cols, rows = settings.module.get_optimal_tiled_canvas(image_wh[::-1], tile, *most)
    thumbnail = [whole(image_wh, cells, cells)] if rows * cols > 1 else []
    return layout_of_views(image_wh, [tiles(image_wh, rows, cols, cells, cells), *thumbnail])


def ovis2(settings: Settings, image_wh: Size, images: int) -> Layout:
    """Thumbnail first, then tiles that cover the image."""
    cells, rows, cols = settings.tokens_per_side(), 1, 1
    if settings.crop_to_patches and settings.max_patches > 1:
        tile, most = (settings.size["height"], settings.size["width"]), settings.max_patches
        if settings.use_covering_area_grid:
            cols, rows = settings.module.get_min_tile_covering_grid(image_wh[::-1], tile[0], most)
        else:
            cols, rows = settings.module.get_optimal_tiled_canvas(image_wh[::-1], tile, settings.min_patches, most)
    grid = [tiles(image_wh, rows, cols, cells, cells)] if rows * cols > 1 else []
    return layout_of_views(image_wh, [whole(image_wh, cells, cells), *grid])


def idefics3(settings: Settings, image_wh: Size, images: int) -> Layout:
    """Tiles, thumbnail last: the longest edge is resized, then both edges to multiples of the tile."""
    cells, tile = settings.tokens_per_side(), settings.max_image_size["longest_edge"]
    rows = cols = 1
    if settings.do_image_splitting:
        height, width = image_wh[::-1]
        if longest := dict(settings.size).get("longest_edge"):
            height, width = settings.module._resize_output_size_rescale_to_max_len(height, width, max_len=longest)
            height, width = settings.module._resize_output_size_scale_below_upper_bound(
                height, width, max_len=settings.module.MAX_IMAGE_SIZE
            )
        else:
            height, width = settings.size["height"], settings.size["width"]
        ratio = width / height
        if width >= height:
            cols = math.ceil(width / tile)
            rows = math.ceil(int(cols * tile / ratio) / tile)
        else:
            rows = math.ceil(height / tile)
            cols = math.ceil(int(rows * tile * ratio) / tile)
    thumbnail = [whole(image_wh, cells, cells)] if rows * cols > 1 else []
    return layout_of_views(image_wh, [tiles(image_wh, rows, cols, cells, cells), *thumbnail])


def lfm2(settings: Settings, image_wh: Size, images: int) -> Layout:
    """One grid that follows the image's shape; of large images tiles before it."""
    height, width = image_wh[::-1]
    patch, merged = settings.encoder_patch_size, settings.downsample_factor
    most, own = settings.max_image_tokens, settings.image_processor
    resized_wh = own.smart_resize(height, width, merged, settings.min_image_tokens, most, patch)
    cols, rows = (math.ceil(edge // patch / merged) for edge in resized_wh)
    thumbnail = whole(image_wh, rows, cols)
    is_split = settings.do_image_splitting and not settings.min_tiles == settings.max_tiles == 1
    if not is_split or not own._is_image_too_large(height, width, most, patch, merged, settings.max_pixels_tolerance):
        return layout_of_views(image_wh, [thumbnail])
    limits = settings.min_tiles, settings.max_tiles, settings.tile_size
    tile_cols, tile_rows = own._get_grid_layout(height, width, *limits)[:2]
    cells = math.ceil(settings.tile_size // patch / merged)
    canvas = tiles(image_wh, tile_rows, tile_cols, cells, cells)
    return layout_of_views(image_wh, [canvas, thumbnail] if settings.use_thumbnail else [canvas])


def minicpm(settings: Settings, image_wh: Size, images: int) -> Layout:
    """The image first, then slices of a canvas of its own shape."""
    hw, own = image_wh[::-1], settings.image_processor
    resolution, patch, mode = settings.scale_resolution, settings.patch_size, settings.downsample_mode
    cell = patch * (2 if mode == "4x" else 4)
    grid = own.get_sliced_grid(hw, settings.max_slice_nums, resolution) if settings.slice_mode else None
    rows, cols = (edge // cell for edge in own.find_best_resize(hw, resolution, patch, mode, grid is None))
    views = [whole(image_wh, rows, cols)]
    if grid is not None:
        canvas = own.get_refine_size(hw, grid, resolution, patch, mode, True)
        rows, cols = (edge // slices // cell for edge, slices in zip(canvas, grid, strict=True))
        views.append(tiles(image_wh, grid[0], grid[1], rows, cols))
    return layout_of_views(image_wh, views)


# Rule 4: a canvas of tiles that keeps the shape of the image, with padding.


def llama4(settings: Settings, image_wh: Size, images: int) -> Layout:
    """Tiles of an image padded right and below; thumbnail last."""
    import torch

    hw, own, side = image_wh[::-1], settings.module, settings.size["height"]
    cells = side // settings.processor.patch_size // math.isqrt(settings.processor.downsample_ratio)
    size = own.SizeDict(height=side, width=settings.size["width"])
    resolutions = torch.tensor(own.find_supported_resolutions(settings.max_patches, size))
    enlarges = settings.resize_to_max_canvas
    canvas = [int(edge) for edge in own.get_best_fit(hw, resolutions, enlarges)]
    target = canvas if enlarges else [min(max(edge, side), most) for edge, most in zip(hw, canvas, strict=True)]
    resized = own.get_max_res_without_distortion(hw, target)
    rows, cols = (edge // side for edge in canvas)
    y, x = (
        spread(0, edge * padded / max(scaled, 1), padded // side * cells)
        for edge, padded, scaled in zip(hw, canvas, resized, strict=True)
    )
    if rows * cols == 1:
        return layout_of_views(image_wh, [View(x, y)])
    return layout_of_views(image_wh, [View(x, y, (rows, cols), "tiles"), whole(image_wh, cells, cells)])


def anyres(settings: Settings, image_wh: Size, images: int) -> Layout:
    """Base tile, then a letterboxed canvas without its padding, each row closed by `image_newline`: LLaVA-NeXT's.

    LLaVA-OneVision's interpolates large canvases, and pads each of several images of a sample to one tile.
    """
    processor, hw = settings.processor, image_wh[::-1]
    crop = getattr(settings, "crop_size", None)
    side = (crop and crop["height"]) or settings.side
    is_onevision = hasattr(processor, "vision_aspect_ratio")
    cells = settings.tokens_per_side() if is_onevision else side // processor.patch_size
    patch = side // cells
    seen = patch * cells / side
    if is_onevision and images > 1:
        pad_x, pad_y = square_padding_xy(image_wh)
        edge = max(image_wh) * seen
        view = View(spread(-pad_x, edge - pad_x, cells), spread(-pad_y, edge - pad_y, cells))
        grid = layout_of_views(image_wh, [view])
        return Layout(grid.grids, grid.length + 1)  # image_newline
    canvas = select_best_resolution(hw, settings.image_grid_pinpoints)
    scale = min(canvas[1] / hw[1], canvas[0] / hw[0])
    y, x = (_canvas_edges(edge, padded, scale, side, cells) for edge, padded in zip(hw, canvas, strict=True))
    # Padding is cut off in whole tokens, as the model does: those of the side that is too long.
    rows, cols = len(y) - 1, len(x) - 1
    if hw[1] / hw[0] > cols / rows:
        cut = (rows - int(round(hw[0] * (cols / hw[1]), 7))) // 2
        y = y[cut : len(y) - cut]
    else:
        cut = (cols - int(round(hw[1] * (rows / hw[0]), 7))) // 2
        x = x[cut : len(x) - cut]
    if is_onevision:
        rows, cols, most = len(y) - 1, len(x) - 1, int(processor.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * cols / (most * cells**2))
        if ratio > 1.1:
            y, x = spread(y[0], y[-1], int(rows // ratio)), spread(x[0], x[-1], int(cols // ratio))
    before = getattr(processor, "num_additional_image_tokens", 0)
    before -= not is_onevision and processor.vision_feature_select_strategy == "default"
    return layout_of_views(image_wh, [whole(image_wh, cells, cells, seen), View(x, y, (1, 1), "tiles", 1)], before)


def _canvas_edges(edge: int, canvas: int, scale: float, side: int, cells: int) -> list[float]:
    """Return the edges of cells along one axis of a letterboxed canvas, in pixels of the original image."""
    resized = min(math.ceil(edge * scale), canvas)
    pad = (canvas - resized) // 2
    # Where patches leave the end of a tile out, its last cell takes it.
    model = [tile * side + cell * (side // cells) for tile in range(canvas // side) for cell in range(cells)] + [canvas]
    return [(position - pad) * edge / resized for position in model]


# Rule 5: the image, and crops of the original.


def pan_and_scan(settings: Settings, image_wh: Size, images: int) -> Layout:
    """The whole image first, then crops along its longer edge: Gemma 3's."""
    cells = settings.tokens_per_side()
    views = [whole(image_wh, cells, cells)]
    longest, shortest = max(image_wh), min(image_wh)
    if settings.do_pan_and_scan and longest / shortest >= settings.pan_and_scan_min_ratio_to_activate:
        least = settings.pan_and_scan_min_crop_size
        crops = min(longest // least, math.floor(longest / shortest + 0.5))
        crops = min(settings.pan_and_scan_max_num_crops, max(2, crops))
        step = math.ceil(longest / crops)
        if min(step, shortest) >= least:
            for start in range(0, crops * step, step):
                along, across = spread(start, min(start + step, longest), cells), spread(0, shortest, cells)
                x, y = (along, across) if image_wh[0] >= image_wh[1] else (across, along)
                views.append(View(x, y, kind="crop"))
    return layout_of_views(image_wh, views)


# Rule 6: tokens pooled over patches of overlapping crops.


def molmo2(settings: Settings, image_wh: Size, images: int) -> Layout:
    """A thumbnail first, then a canvas of overlapping crops whose margins are dropped; both pooled, with padding."""
    side, patch = settings.size["height"], settings.patch_size
    limits = settings.max_crops, settings.overlap_margins, side, patch
    *_, canvas_height, canvas_width = settings.module.compute_crop_geometry(*image_wh[::-1], *limits)
    pooled_rows, pooled_cols = settings.pooling_size

    def view(height: int, width: int, kind: Kind) -> View:
        x = _pooled_edges(image_wh[0], width, patch, pooled_cols)
        return View(x, _pooled_edges(image_wh[1], height, patch, pooled_rows), kind=kind)

    return layout_of_views(image_wh, [view(side, side, "whole"), view(canvas_height, canvas_width, "tiles")])


def _pooled_edges(edge: int, model: int, patch: int, pooled: int) -> list[float]:
    """Return the edges of cells of `pooled` patches. What is missing of whole cells is split on both sides."""
    patches = model // patch
    cells = math.ceil(patches / pooled)
    first = -((cells * pooled - patches) // 2)
    return [(first + cell * pooled) * patch * edge / model for cell in range(cells + 1)]


RULES: dict[str, Rule] = {
    "Qwen2VLImageProcessor": dynamic_grid(_qwen),  # Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5
    "VideoLlama3ImageProcessor": dynamic_grid(_qwen),
    "Ernie4_5_VLMoeImageProcessor": dynamic_grid(_qwen),
    "PaddleOCRVLImageProcessor": dynamic_grid(_qwen),
    "Glm4vImageProcessor": dynamic_grid(_glm),
    "Kimi_K25ImageProcessor": dynamic_grid(_kimi),
    "Gemma4ImageProcessor": dynamic_grid(_gemma4),
    "Gemma4UnifiedImageProcessor": dynamic_grid(_gemma4),
    "PixtralImageProcessor": dynamic_grid(_pixtral),  # Mistral 3, Pixtral, LightOnOCR
    "CLIPImageProcessor": square,
    "SiglipImageProcessor": square,  # PaliGemma
    "BitImageProcessor": square,  # DINOv2 under LLaVA
    "LlavaImageProcessor": square,
    "DeepseekVLImageProcessor": letterboxed_square,
    "GotOcr2ImageProcessor": got_ocr2,  # InternVL, Aya Vision
    "Cohere2VisionImageProcessor": cohere2,
    "Ovis2ImageProcessor": ovis2,
    "Idefics3ImageProcessor": idefics3,
    "SmolVLMImageProcessor": idefics3,
    "Lfm2VlImageProcessor": lfm2,
    "MiniCPMV4_6ImageProcessor": minicpm,
    "Llama4ImageProcessor": llama4,
    "LlavaNextImageProcessor": anyres,
    "LlavaOnevisionImageProcessor": anyres,
    "Gemma3ImageProcessor": pan_and_scan,
    "Molmo2ImageProcessor": molmo2,
}
"""Registry of rules, by the class of the image processor. A class on PIL (`...Pil`) has the rule of its namesake."""

_QUERIES = "its visual tokens are learned queries that each read the whole image, so they have no place in it"
_ATTENDED = "its LLM reads the image by cross-attention, so the input sequence has no visual tokens"
NO_PLACE = {
    "AriaProcessor": _QUERIES,
    "Blip2Processor": _QUERIES,
    "InstructBlipProcessor": _QUERIES,
    "InstructBlipVideoProcessor": _QUERIES,
    "Idefics2Processor": _QUERIES,
    "Kosmos2Processor": _QUERIES,
    "Kosmos2_5Processor": _QUERIES,
    "MllamaProcessor": _ATTENDED,
    "IdeficsProcessor": _ATTENDED,
    "Florence2Processor": "it is an encoder-decoder, whose visual tokens are not among the inputs of its decoder",
    "Granite4VisionProcessor": "it adds image features in layers of its LLM; its visual tokens are zero before that",
}
"""Processors whose models have no visual tokens with a place, and why."""
