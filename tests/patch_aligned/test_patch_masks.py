"""Coverage from run lengths against decoded masks, and the masks that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from patch_aligned.cells import Layout, TokenGrid, grid_over_box, square_grid
from patch_aligned.masks import (
    PatchMaskError,
    covered_tokens_of_layout,
    covered_tokens_of_regions,
    token_coverage_of_regions,
)
from tests.pads import rle_of


def cells(aspect_ratio: str, size_wh: tuple[int, int], side: int, shape: tuple[int, int]) -> TokenGrid:
    return square_grid(size_wh, {"square": "crop", "pad": "pad", "anyres": "squeeze"}[aspect_ratio], shape, side)


def covered_tokens(rle_mask: str, size_wh: tuple[int, int], grid: TokenGrid, min_coverage: float = 0.5) -> np.ndarray:
    return covered_tokens_of_regions([rle_mask], size_wh, grid, min_coverage)[0]


def decoded_coverage(masks: np.ndarray, grid: TokenGrid) -> np.ndarray:
    """Share of each cell under each mask, by the overlap of every pixel with every cell: `[R, rows, cols]`."""

    def overlaps(edges: tuple[float, ...], length: int) -> np.ndarray:
        starts, ends = np.array(edges[:-1])[:, None], np.array(edges[1:])[:, None]  # [cells, 1]
        pixels = np.arange(length)
        return np.clip(np.minimum(ends, pixels + 1) - np.maximum(starts, pixels), 0, None) / (ends - starts)

    height, width = masks.shape[-2:]
    return overlaps(grid.y_edges, height) @ masks.astype(np.float64) @ overlaps(grid.x_edges, width).T


def random_masks(seed: int, regions: int, size_wh: tuple[int, int], density: float) -> np.ndarray:
    return np.random.default_rng(seed).random((regions, size_wh[1], size_wh[0])) < density


@settings(max_examples=150)
@given(
    st.sampled_from(["square", "pad", "anyres"]),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from([(24, 24), (16, 16), (2, 5)]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.02, 0.5, 0.97, 1.0]),
    st.integers(0, 2**31),
)
def test_equals_the_decoded_mask(mode, size_wh, shape, regions, density, seed) -> None:
    grid = cells(mode, size_wh, 336, shape)
    masks = random_masks(seed, regions, size_wh, density)
    rle_masks = [rle_of(mask) for mask in masks]
    decoded = np.stack([coco_mask.decode({"size": size_wh[::-1], "counts": rle}) for rle in rle_masks])
    np.testing.assert_array_equal(decoded, masks)
    coverage = token_coverage_of_regions(rle_masks, size_wh, grid)
    np.testing.assert_allclose(coverage, decoded_coverage(masks, grid), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size_wh", [(4032, 3024), (1, 3000), (5001, 17)])
def test_stays_exact_on_large_and_extreme_images(size_wh: tuple[int, int]) -> None:
    grid = cells("square", size_wh, 336, (24, 24))
    y, x = np.mgrid[: size_wh[1], : size_wh[0]]
    mask = (x * 7 + y * 3) % 301 < 140  # a quarter of a million runs in the largest
    coverage = token_coverage_of_regions([rle_of(mask)], size_wh, grid)[0]
    np.testing.assert_allclose(coverage, decoded_coverage(mask, grid), rtol=0, atol=1e-11)


def test_the_threshold_is_inclusive() -> None:
    grid = cells("square", (6, 6), 4, (2, 2))  # cells of 3 x 3 pixels
    mask = np.zeros((6, 6))
    mask[0, :3] = mask[1, 0] = 1  # 4 of 9 pixels of the first cell
    mask[3:, 3:] = 1
    tokens = covered_tokens(rle_of(mask), (6, 6), grid)
    assert tokens.dtype == bool
    assert tokens.tolist() == [False, False, False, True]
    assert covered_tokens(rle_of(mask), (6, 6), grid, 4 / 9).tolist() == [True, False, False, True]
    halves = cells("pad", (4, 2), 8, (2, 2))  # above and below the image lies padding
    assert covered_tokens(rle_of(np.ones((2, 4))), (4, 2), halves).tolist() == [True] * 4


def test_tokens_run_row_by_row() -> None:
    grid = cells("square", (3, 3), 3, (3, 3))
    mask = np.zeros((3, 3))
    mask[0, 2] = 1
    assert np.flatnonzero(covered_tokens(rle_of(mask), (3, 3), grid)).tolist() == [2]


def test_a_region_may_cover_nothing() -> None:
    grid = cells("square", (9, 3), 3, (3, 3))  # the crop keeps the middle third
    outside = np.zeros((3, 9))
    outside[:, :3] = 1
    tokens = covered_tokens_of_regions([rle_of(outside), rle_of(np.zeros((3, 9)))], (9, 3), grid)
    assert tokens.shape == (2, 9)
    assert not tokens.any()
    assert covered_tokens_of_regions([], (9, 3), grid).shape == (0, 9)


def test_a_layout_gives_the_tokens_of_each_of_its_grids() -> None:
    size_wh = (37, 23)
    thumbnail = grid_over_box(size_wh, (0, 0, *size_wh), (3, 5))
    tiles = grid_over_box(size_wh, (-2.5, 0.5, 40, 30), (7, 9))
    order = np.random.default_rng(0).permutation(7 * 9).reshape(7, 9) + 15
    layout = Layout((TokenGrid(size_wh, tiles.x_edges, tiles.y_edges, order, "tiles"), thumbnail), 7 * 9 + 15 + 2)
    rle_masks = [rle_of(mask) for mask in random_masks(1, 70, size_wh, 0.6)]
    covered = covered_tokens_of_layout(rle_masks, size_wh, layout)
    for grid in layout.grids:
        expected = covered_tokens_of_regions(rle_masks, size_wh, grid)
        np.testing.assert_array_equal(covered[:, grid.tokens.ravel()], expected)
    assert covered[:, :15].any() and covered[:, 15:78].any() and not covered[:, 78:].any()
    with pytest.raises(PatchMaskError, match=r"cat\.jpg, region 66, rle_mask: found an empty string"):
        covered_tokens_of_layout([*rle_masks[:66], "", *rle_masks[66:]], size_wh, layout, record="cat.jpg")


@pytest.mark.parametrize(
    ("size_wh", "message"),
    [
        ((4, 6), r"pad\.json record 3, size: found \[4, 6\], expected \[6, 4\].*swapped"),
        ((12, 8), r"pad\.json record 3, size: found \[12, 8\], expected \[6, 4\].*another file or copy"),
    ],
)
def test_a_size_that_is_not_the_images_is_refused(size_wh: tuple[int, int], message: str) -> None:
    grid = cells("square", (6, 4), 2, (2, 2))
    rle_mask = rle_of(np.ones((size_wh[1], size_wh[0])))
    with pytest.raises(PatchMaskError, match=message):
        covered_tokens_of_regions([rle_mask], size_wh, grid, record="pad.json record 3")


@pytest.mark.parametrize(
    ("rle_mask", "found"),
    [
        (rle_of(np.ones((4, 5))), "found runs that sum to 20 pixels, expected runs that sum to 6 x 4 = 24 pixels"),
        ("", "found an empty string"),
        ("H0\x7f", "found a character"),
        ("é", "found a character"),
        (rle_of(np.ones((4, 6)))[:-1] + "h", "found "),
        ("J", "found a run of -6 pixels"),
    ],
)
def test_a_malformed_mask_is_named(rle_mask: str, found: str) -> None:
    grid = cells("square", (6, 4), 2, (2, 2))
    whole = rle_of(np.ones((4, 6)))
    with pytest.raises(PatchMaskError, match=f"cat\\.jpg, region 1, rle_mask: {found}"):
        covered_tokens_of_regions([whole, rle_mask, whole], (6, 4), grid, record="cat.jpg")


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_no_string_does_worse_than_raise(rle_mask: str) -> None:
    grid = cells("square", (6, 4), 2, (2, 2))
    try:
        coverage = token_coverage_of_regions([rle_mask], (6, 4), grid)
    except PatchMaskError:
        return
    decoded = coco_mask.decode({"size": [4, 6], "counts": rle_mask})
    np.testing.assert_allclose(coverage[0], decoded_coverage(decoded, grid), rtol=0, atol=1e-12)


def test_impossible_thresholds_are_refused() -> None:
    grid = cells("square", (6, 4), 2, (2, 2))
    for threshold in (0.0, -0.1, 1.01):
        with pytest.raises(ValueError, match="min_coverage"):
            covered_tokens(rle_of(np.ones((4, 6))), (6, 4), grid, threshold)
