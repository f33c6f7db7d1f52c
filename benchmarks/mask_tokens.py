"""Speed of a region's token coverage from its run-length encoded mask, relative to merely decoding the mask.

    python benchmarks/mask_tokens.py

Ratios above 1 mean that exact coverage takes less time than `pycocotools.mask.decode` alone. Every coverage is compared
with the decoded mask's in the same run. The last line is of an image with 1,000 regions under InternVL's tiles.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core; read when numpy loads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from measuring import command_line, times_of
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask

from patch_aligned import masks as patch_masks
from patch_aligned.cells import square_grid
from patch_aligned.models.layouts import layouts_of

TARGET = 0.4
IMAGE_WH, REGIONS, SIDE, GRID = (448, 336), 4, 336, 24  # regions of an image as in PAD
TILED_WH, TILED_REGIONS, TILED_MASKS = (1280, 960), 1000, 50


def blob_masks(count: int, size_wh: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Ragged blobs of 1% to half of an image, like the masks of a segmentation network: bool `[count, h, w]`."""
    width, height = size_wh
    masks = []
    for _ in range(count):
        canvas = Image.new("L", size_wh)
        corners = int(rng.integers(6, 30))
        angles = np.sort(rng.random(corners)) * 2 * np.pi
        radii = rng.uniform(0.08, 0.5) * height * rng.uniform(0.5, 1.3, corners)
        x = rng.uniform(0.1, 0.9) * width + radii * np.cos(angles)
        y = rng.uniform(0.1, 0.9) * height + radii * np.sin(angles)
        ImageDraw.Draw(canvas).polygon(list(zip(x.tolist(), y.tolist(), strict=True)), fill=255)
        smooth = np.asarray(canvas.filter(ImageFilter.GaussianBlur(4)), dtype=np.float64)
        grain = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4), dtype=np.uint8)).resize(size_wh)
        masks.append(smooth + (np.asarray(grain, dtype=np.float64) - 128) / 3 > 128)
    return np.stack(masks)


def overlaps(edges: Sequence[float], length: int) -> np.ndarray:
    """Share of each cell that each pixel has, along one side: `[cells, length]`."""
    starts, ends = np.array(edges[:-1])[:, None], np.array(edges[1:])[:, None]
    pixels = np.arange(length)
    return np.clip(np.minimum(ends, pixels + 1) - np.maximum(starts, pixels), 0, None) / (ends - starts)


class Comparison(NamedTuple):
    """Seconds for all regions of the sample, and the number of coverages that differ from the decoded mask's."""

    regions: int
    differing: int
    decode_s: float
    cover_s: float
    cover_new_sizes_s: float


def compare(count: int = 50, repeats: int = 20) -> Comparison:
    """Times decoding and coverage of the masks of `count` images, by the processor; medians count."""
    grid = square_grid(IMAGE_WH, "crop", (GRID, GRID), SIDE)
    rng = np.random.default_rng(0)
    images = [blob_masks(REGIONS, IMAGE_WH, rng) for _ in range(count)]
    encoded = [[coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks] for masks in images]
    strings = [[rle["counts"].decode("ascii") for rle in rles] for rles in encoded]

    def decode() -> None:
        for rles in encoded:
            coco_mask.decode(rles)

    def cover() -> None:
        for rle_masks in strings:
            patch_masks.token_coverage_of_regions(rle_masks, IMAGE_WH, grid)

    def cover_new_sizes() -> None:
        for rle_masks in strings:
            patch_masks._cell_tables.cache_clear()
            patch_masks.token_coverage_of_regions(rle_masks, IMAGE_WH, grid)

    differing = 0
    for masks, rle_masks in zip(images, strings, strict=True):
        coverage = patch_masks.token_coverage_of_regions(rle_masks, IMAGE_WH, grid)
        cols_by_x, rows_by_y = map(overlaps, (grid.x_edges, grid.y_edges), IMAGE_WH)
        decoded = rows_by_y @ masks.astype(np.float64) @ cols_by_x.T  # [R, rows, cols]
        differing += int((np.abs(coverage - decoded) > 1e-12).sum())

    actions = (decode, cover, cover_new_sizes)
    medians = (statistics.median(times_of(action, repeats, time.process_time)) for action in actions)
    return Comparison(count * REGIONS, differing, *medians)


def tiled_image(repeats: int) -> tuple[float, float]:
    """Seconds for layout and regions of an image under InternVL's 12 tiles and thumbnail, and megabytes of RLE."""
    from transformers import GotOcr2ImageProcessorPil

    side = {"height": 448, "width": 448}
    images = GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, min_patches=1, max_patches=12)
    processor = SimpleNamespace(image_processor=images, image_seq_length=256)
    masks = blob_masks(TILED_MASKS, TILED_WH, np.random.default_rng(0))
    rle_masks = [patch_masks.rle_of_mask(mask) for mask in masks] * (TILED_REGIONS // TILED_MASKS)

    def cover() -> None:
        [layout] = layouts_of(processor, [TILED_WH])
        patch_masks.covered_tokens_of_layout(rle_masks, TILED_WH, layout)

    seconds = statistics.median(times_of(cover, repeats, time.process_time))
    return seconds, sum(map(len, rle_masks)) / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; the exit status is 1 if coverage is slower than the target or differs from the reference."""
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="passes over the sample; medians count (default 20)")
    repeats = parser.parse_args(arguments).repeats
    regions, differing, decoding, covering, covering_new = compare(repeats=repeats)
    print(f"{decoding / covering:.2f}x the speed of decoding alone (target {TARGET}x)")
    print(f"{decoding / covering_new:.2f}x where each image has a size not seen before")
    print(f"{differing} of {regions * GRID**2} coverages differ from the decoded mask's by more than 1e-12")
    print(
        f"microseconds a region: decode {decoding / regions * 1e6:.0f}, coverage {covering / regions * 1e6:.0f}; "
        f"{IMAGE_WH[0]}x{IMAGE_WH[1]}, {REGIONS} regions an image, grid {GRID}"
    )
    tiled, megabytes = tiled_image(repeats)
    print(
        f"{tiled * 1e3:.0f} ms for layout and {TILED_REGIONS:,} regions of {TILED_WH[0]}x{TILED_WH[1]} under 13 tiles, "
        f"{megabytes:.1f} MB of RLE: {megabytes / tiled:.0f} MB a second"
    )
    return int(differing > 0 or decoding / covering < TARGET)


if __name__ == "__main__":
    sys.exit(main())
