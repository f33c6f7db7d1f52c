"""Speed of a training sample's regions from a pack of covered tokens, relative to working them out from the masks.

    python benchmarks/packed_tokens.py

Both read the same memory-mapped index in the same random order, as data workers do. Every batch of tokens is compared
with the masks' in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core; read when numpy loads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from mask_tokens import blob_masks, seconds
from pycocotools import mask as coco_mask

from llava.image_geometry import ImageGeometry
from patch_aligned.masks import covered_tokens_of_regions
from patch_aligned.packed_tokens import PackedFor, PackedTokens, open_packed_tokens, pack_tokens
from patch_aligned.pad import AnnotatedImage, AnnotationIndex, Region, open_annotation_index, write_annotations

TARGET = 5.0
MIN_COVERAGE = 0.5
TAGS = ("water", "traffic light", "person", "wooden table")


def write_pad(path: Path, images: int, regions: int, size_wh: tuple[int, int], rng: np.random.Generator) -> None:
    """A PAD file of blobs; a few hundred masks are drawn and used again."""
    masks = blob_masks(min(images * regions, 400), size_wh, rng)
    counts = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode("ascii") for mask in masks]
    box = (0.0, 0.0, float(size_wh[0]), float(size_wh[1]))

    def image(number: int) -> AnnotatedImage:
        chosen = rng.integers(len(counts), size=regions)
        labels = (Region(TAGS[place % len(TAGS)], box, counts[mask]) for place, mask in enumerate(chosen))
        return AnnotatedImage(f"{number:08}.jpg", size_wh, "a caption", tuple(labels))

    write_annotations(map(image, range(images)), path)


def compare(index: AnnotationIndex, pack: PackedTokens, geometry: ImageGeometry, repeats: int) -> tuple[float, float]:
    """Seconds for all images, from the masks and from the pack.

    Raises:
        AssertionError: if tags or tokens differ.
    """
    rows = np.random.default_rng(1).permutation(len(index)).tolist()
    names = {row: index[row].image_id for row in rows}

    def from_masks(row: int) -> tuple[list[str], np.ndarray]:
        image = index[row]
        masks = [region.rle_mask for region in image.regions]
        return [region.tag for region in image.regions], covered_tokens_of_regions(masks, image.size_wh, geometry)

    def from_pack(row: int) -> tuple[Sequence[str], np.ndarray]:
        return pack.read(row, names[row], geometry)

    for row in rows:
        (tags, tokens), (packed_tags, packed_tokens) = from_masks(row), from_pack(row)
        assert tags == packed_tags and np.array_equal(tokens, packed_tokens), f"row {row} differs"
    return (
        seconds(lambda: [from_masks(row) for row in rows], repeats),
        seconds(lambda: [from_pack(row) for row in rows], repeats),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; the exit status is 1 if the pack is slower than the target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=int, default=2000, help="images of the file (default 2000)")
    parser.add_argument("--regions", type=int, default=4, help="regions of an image (default 4, as in PAD)")
    parser.add_argument("--width", type=int, default=448, help="width of the images in pixels (default 448)")
    parser.add_argument("--height", type=int, default=336, help="height of the images in pixels (default 336)")
    parser.add_argument("--grid", type=int, default=24, help="tokens along a side (default 24)")
    parser.add_argument("--side", type=int, default=336, help="side of the model image (default 336)")
    parser.add_argument("--repeats", type=int, default=5, help="passes over the file; medians count (default 5)")
    options = parser.parse_args(arguments)

    size_wh, regions = (options.width, options.height), options.images * options.regions
    geometry = ImageGeometry.of("square", size_wh, options.side, (options.grid, options.grid))
    with tempfile.TemporaryDirectory() as folder:
        pad, path = Path(folder) / "pad.jsonl", Path(folder) / "pad.packed.arrow"
        write_pad(pad, options.images, options.regions, size_wh, np.random.default_rng(0))
        index = open_annotation_index(pad, Path(folder) / "cache")
        start = time.perf_counter()
        pack_tokens(index, PackedFor.of(geometry, MIN_COVERAGE), path)
        packing = time.perf_counter() - start
        pack = open_packed_tokens(index, path, MIN_COVERAGE)
        assert pack is not None
        with_masks, with_pack = compare(index, pack, geometry, options.repeats)
        pad_bytes, pack_bytes = pad.stat().st_size, path.stat().st_size
    print(f"{with_masks / with_pack:.1f}x the speed of reading the masks (target {TARGET:.0f}x)")
    print(f"{pad_bytes / pack_bytes:.1f}x smaller than the PAD file; {pack_bytes / regions:.0f} bytes a region")
    print(
        f"microseconds a region: masks {with_masks / regions * 1e6:.0f}, pack {with_pack / regions * 1e6:.0f}, packing "
        f"once {packing / regions * 1e6:.0f}; {options.width}x{options.height}, {options.regions} regions an image, "
        f"grid {options.grid}"
    )
    return int(with_masks / with_pack < TARGET)


if __name__ == "__main__":
    sys.exit(main())
