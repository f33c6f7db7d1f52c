"""Speed of a region's token coverage from its run-length encoded mask, relative to merely decoding the mask.

    python benchmarks/mask_tokens.py

Ratios above 1 mean that exact coverage takes less time than `pycocotools.mask.decode` alone. Every coverage is compared
with the decoded mask's in the same run. The last line is of an image with 1,000 regions under InternVL's tiles.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core; read when numpy loads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask

from patch_aligned import masks as patch_masks
from patch_aligned.cells import Treatment, square_grid
from patch_aligned.models.layouts import layouts_of

TARGET = 0.4
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


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Median time of an action on one core, whatever else the machine does meanwhile."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return float(np.median(times))


def overlaps(edges: Sequence[float], length: int) -> np.ndarray:
    """Share of each cell that each pixel has, along one side: `[cells, length]`."""
    starts, ends = np.array(edges[:-1])[:, None], np.array(edges[1:])[:, None]
    pixels = np.arange(length)
    return np.clip(np.minimum(ends, pixels + 1) - np.maximum(starts, pixels), 0, None) / (ends - starts)


class Comparison(NamedTuple):
    """Seconds for all regions of the sample, and the number of coverages that differ from the decoded mask's."""

    differing: int
    decode_s: float
    cover_s: float
    cover_new_sizes_s: float


def compare(options: argparse.Namespace) -> Comparison:
    """Times decoding and coverage of the same masks."""
    size_wh = (options.width, options.height)
    treatments: dict[str, Treatment] = {"square": "crop", "pad": "pad", "anyres": "squeeze"}
    shape = (options.grid, options.grid)
    grid = square_grid(size_wh, treatments[options.image_aspect_ratio], shape, options.side)
    rng = np.random.default_rng(options.seed)
    images = [blob_masks(options.regions, size_wh, rng) for _ in range(options.images)]
    encoded = [[coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks] for masks in images]
    strings = [[rle["counts"].decode("ascii") for rle in rles] for rles in encoded]

    def decode() -> None:
        for rles in encoded:
            coco_mask.decode(rles)

    def cover() -> None:
        for rle_masks in strings:
            patch_masks.token_coverage_of_regions(rle_masks, size_wh, grid)

    def cover_new_sizes() -> None:
        for rle_masks in strings:
            patch_masks._cell_tables.cache_clear()
            patch_masks.token_coverage_of_regions(rle_masks, size_wh, grid)

    differing = 0
    for masks, rle_masks in zip(images, strings, strict=True):
        coverage = patch_masks.token_coverage_of_regions(rle_masks, size_wh, grid)
        rows_by_y, cols_by_x = overlaps(grid.y_edges, options.height), overlaps(grid.x_edges, options.width)
        decoded = rows_by_y @ masks.astype(np.float64) @ cols_by_x.T  # [R, rows, cols]
        differing += int((np.abs(coverage - decoded) > 1e-12).sum())

    return Comparison(
        differing=differing,
        decode_s=seconds(decode, options.repeats),
        cover_s=seconds(cover, options.repeats),
        cover_new_sizes_s=seconds(cover_new_sizes, options.repeats),
    )


def tiled_image(repeats: int, seed: int) -> tuple[float, float]:
    """Seconds for layout and regions of an image under InternVL's 12 tiles and thumbnail, and megabytes of RLE."""
    from transformers import GotOcr2ImageProcessorPil

    side = {"height": 448, "width": 448}
    images = GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, min_patches=1, max_patches=12)
    processor = SimpleNamespace(image_processor=images, image_seq_length=256)
    masks = blob_masks(TILED_MASKS, TILED_WH, np.random.default_rng(seed))
    rle_masks = [patch_masks.rle_of_mask(mask) for mask in masks] * (TILED_REGIONS // TILED_MASKS)

    def cover() -> None:
        [layout] = layouts_of(processor, [TILED_WH])
        patch_masks.covered_tokens_of_layout(rle_masks, TILED_WH, layout)

    return seconds(cover, repeats), sum(map(len, rle_masks)) / 1e6


def parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument("--width", type=int, default=448, help="width of the images in pixels (default 448)")
    flags.add_argument("--height", type=int, default=336, help="height of the images in pixels (default 336)")
    flags.add_argument("--regions", type=int, default=4, help="regions of an image (default 4, as in PAD)")
    flags.add_argument("--images", type=int, default=50, help="images in the sample (default 50)")
    flags.add_argument("--repeats", type=int, default=20, help="passes over the sample; medians count (default 20)")
    flags.add_argument("--side", type=int, default=336, help="side of the model image (default 336)")
    flags.add_argument("--grid", type=int, default=24, help="tokens along a side (default 24)")
    flags.add_argument("--image_aspect_ratio", default="square", choices=["square", "pad", "anyres"])
    flags.add_argument("--seed", type=int, default=0)
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; the exit status is 1 if coverage is slower than the target or differs from the reference."""
    options = parser().parse_args(arguments)
    differing, decoding, covering, covering_new = compare(options)
    regions = options.images * options.regions
    print(f"{decoding / covering:.2f}x the speed of decoding alone (target {TARGET}x)")
    print(f"{decoding / covering_new:.2f}x where each image has a size not seen before")
    print(f"{differing} of {regions * options.grid**2} coverages differ from the decoded mask's by more than 1e-12")
    print(
        f"microseconds a region: decode {decoding / regions * 1e6:.0f}, coverage {covering / regions * 1e6:.0f}; "
        f"{options.width}x{options.height}, {options.regions} regions an image, grid {options.grid}"
    )
    tiled, megabytes = tiled_image(options.repeats, options.seed)
    print(
        f"{tiled * 1e3:.0f} ms for layout and {TILED_REGIONS:,} regions of {TILED_WH[0]}x{TILED_WH[1]} under 13 tiles, "
        f"{megabytes:.1f} MB of RLE: {megabytes / tiled:.0f} MB a second"
    )
    return int(differing > 0 or decoding / covering < TARGET)


if __name__ == "__main__":
    sys.exit(main())
