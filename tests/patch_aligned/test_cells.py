"""Cells against the real image processors, and coverage on them against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import DINOv3ViTImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava.mm_utils import image_view_of, process_images
from patch_aligned.cells import (
    Layout,
    TokenGrid,
    boxes_xyxy_from_image01,
    boxes_xyxy_from_square01,
    boxes_xyxy_to_square01,
    square_grid,
)
from patch_aligned.masks import covered_tokens_of_regions, token_coverage_of_regions
from patch_aligned.models.llava import layout_of
from tests.oracles.image_geometry import ImageGeometry
from tests.pads import rle_of

TREATMENTS = ("crop", "pad", "squeeze")
ASPECT_RATIOS = (None, "square", "pad", "anyres")
SIZES = [(448, 336), (336, 448), (640, 480), (333, 500), (501, 333), (97, 61), (336, 336), (20, 31), (90, 400)]

sizes = st.tuples(st.integers(1, 60), st.integers(1, 60))
oracles = st.builds(
    ImageGeometry,
    sizes,
    st.sampled_from([14, 28, 30]),
    st.sampled_from(TREATMENTS),
    st.sampled_from([(2, 2), (7, 7), (3, 5), (4, 1)]),
    st.sampled_from([None, 32, 40]),
    st.sampled_from([None, 32]),
)


def cells_of(oracle: ImageGeometry) -> TokenGrid:
    """The same geometry as cells in original pixels."""
    processed = oracle.processed_side or oracle.side
    edge = oracle.shortest_edge or processed
    return square_grid(oracle.original_wh, oracle.mode, oracle.grid, edge, processed, oracle.side)


def exact_coverage(oracle: ImageGeometry, mask: np.ndarray) -> list[list[Fraction]]:
    """Coverage by definition, pixel by pixel and cell by cell, in rational numbers and the model's frame."""
    width, height = oracle.original_wh
    rows, cols = oracle.grid

    def model(axis, position: int) -> Fraction:
        return Fraction((position + axis.pad) * axis.resized, axis.canvas) - axis.cut

    def overlaps(axis, length: int, cells: int) -> list[list[Fraction]]:
        cell = Fraction(oracle.side, cells)
        return [
            [
                max(Fraction(0), min(model(axis, i + 1), cell * (k + 1)) - max(model(axis, i), cell * k)) / cell
                for i in range(length)
            ]
            for k in range(cells)
        ]

    x, y = oracle.axes
    across, down = overlaps(x, width, cols), overlaps(y, height, rows)
    pixels = list(zip(*np.nonzero(mask), strict=True))
    return [
        [sum((down[r][j] * across[c][i] for j, i in pixels), Fraction(0)) for c in range(cols)] for r in range(rows)
    ]


@settings(max_examples=60)
@given(oracles, st.randoms(use_true_random=False))
def test_coverage_equals_rational_arithmetic(oracle: ImageGeometry, random) -> None:
    width, height = oracle.original_wh
    mask = np.array([[random.random() < 0.4 for _ in range(width)] for _ in range(height)])
    exact = exact_coverage(oracle, mask)
    found = token_coverage_of_regions([rle_of(mask)], (width, height), cells_of(oracle))[0]
    np.testing.assert_allclose(found, [[float(share) for share in row] for row in exact], rtol=0, atol=1e-12)
    for least in (Fraction(1, 4), Fraction(1, 2), Fraction(1)):
        covered = covered_tokens_of_regions([rle_of(mask)], (width, height), cells_of(oracle), float(least))[0]
        assert covered.tolist() == [share >= least for row in exact for share in row]


@settings(max_examples=100)
@given(oracles, st.sampled_from([0.0, 0.02, 0.5, 0.97, 1.0]), st.integers(1, 4), st.integers(0, 2**31))
def test_decisions_equal_those_of_integer_areas(oracle: ImageGeometry, density: float, regions: int, seed: int) -> None:
    """Whole numbers decide exactly; cells in floating point may not decide otherwise."""
    width, height = oracle.original_wh
    masks = np.random.default_rng(seed).random((regions, height, width)) < density
    exact = oracle.token_coverage(masks)
    for least in (0.25, 0.5, 0.75, 1.0):
        covered = covered_tokens_of_regions([rle_of(mask) for mask in masks], (width, height), cells_of(oracle), least)
        np.testing.assert_array_equal(covered, (exact >= least).reshape(regions, -1))


@pytest.mark.parametrize("shortest_edge", [112, 131])
@pytest.mark.parametrize("aspect_ratio", ASPECT_RATIOS)
@pytest.mark.parametrize("size_wh", SIZES)
def test_edges_land_where_the_processor_puts_them(
    aspect_ratio: str | None, size_wh: tuple[int, int], shortest_edge: int
) -> None:
    side = 112
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": shortest_edge},
        crop_size={"height": side, "width": side},
        image_mean=[0.0, 0.0, 0.0],  # the padding is then black as well
        image_std=[1.0, 1.0, 1.0],
    )
    layout = layout_of(image_view_of(size_wh, processor, aspect_ratio, (8, 8)))
    assert edges_checked(processor, layout, side, aspect_ratio) or min(size_wh) < 40


@pytest.mark.parametrize("processor_class", [SiglipImageProcessorPil, DINOv3ViTImageProcessor])
@pytest.mark.parametrize("aspect_ratio", ASPECT_RATIOS)
@pytest.mark.parametrize("size_wh", SIZES)
def test_edges_land_where_a_squeezing_processor_puts_them(
    aspect_ratio: str | None, size_wh: tuple[int, int], processor_class: Any
) -> None:
    """SigLIP's and DINOv3's processors keep no aspect ratio; of 112 pixels, 8 patches of 13 leave 8 unseen."""
    square = {"height": 112, "width": 112}
    processor = processor_class(size=square, image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0])
    view = image_view_of(size_wh, processor, aspect_ratio, (8, 8), seen_side=104)
    assert view.treatment == ("pad" if aspect_ratio == "pad" else "squeeze")
    # DINOv3's bilinear kernel keeps areas less exactly where it enlarges.
    tolerance = 0.04 if processor_class is SiglipImageProcessorPil else 0.08
    assert edges_checked(processor, layout_of(view), 104, aspect_ratio, tolerance) or min(size_wh) < 40


def edges_checked(processor: Any, layout: Layout, side: int, aspect_ratio: str | None, tolerance: float = 0.04) -> int:
    """Follows the edges of bright half-planes on grey; how many were found where the cells say.

    The bright area in the processed image tells where an edge has gone. `side` is what patches cover of it, pixels.
    """
    [grid] = layout.grids
    size_wh, box = grid.image_wh, grid.box_xyxy_px
    config = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=[[112, 112]])
    scales = [side / (box[axis + 2] - box[axis]) for axis in (0, 1)]
    checked = 0
    for axis, length in enumerate(size_wh):
        scale, offset = scales[axis], -box[axis] * scales[axis]
        across = 1 - axis
        middle = int((size_wh[across] / 2 - box[across]) * scales[across])
        for edge in {length // 3, length // 2, (2 * length) // 3}:
            predicted = edge * scale + offset
            margin = 3 * max(1.0, scale)  # the reach of the bicubic kernel
            if not max(offset, 0) + margin < predicted < min(length * scale + offset, side) - margin:
                continue
            pixels = np.full((size_wh[1], size_wh[0], 3), 51, np.uint8)
            pixels[(slice(None), slice(edge, None)) if axis == 0 else slice(edge, None)] = 204
            tensor = process_images([Image.fromarray(pixels)], processor, config)
            image = np.asarray(tensor[0, 0, 0] if aspect_ratio == "anyres" else tensor[0, 0])
            profile = image[middle] if axis == 0 else image[:, middle]
            last = int(predicted + margin)  # beyond it all is bright, so the bright area up to it tells the edge
            first = max(int(predicted - margin), 0)
            found = last - (profile[first:last] - 0.2).sum() / 0.6
            assert found == pytest.approx(predicted, abs=tolerance)
            checked += 1
    return checked


def test_known_boxes() -> None:
    assert square_grid((448, 336), "pad", (24, 24), 336).box_xyxy_px == (0, -56, 448, 392)
    assert square_grid((4, 3), "pad", (2, 2), 8).box_xyxy_px == (0, 0, 4, 4)  # one row of padding goes below
    crop = square_grid((500, 333), "crop", (24, 24), 336)  # 504.5 is truncated to 504, 84 are cut on each side
    assert crop.box_xyxy_px == pytest.approx((84 * 500 / 504, 0, 420 * 500 / 504, 333))
    # DINOv2's processors resize the shortest edge to 256 and cut 224: the border leaves, also in pad mode.
    assert square_grid((256, 256), "pad", (16, 16), 256, 224).box_xyxy_px == (16, 16, 240, 240)


def test_what_no_patch_covers_is_outside_the_grid() -> None:
    """SigLIP so400m at 384: 27 patches of 14 pixels end at 378, so a cell is 14 pixels and not 384 / 27."""
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    [grid] = layout_of(image_view_of((384, 384), processor, "square", (27, 27), seen_side=378)).grids
    assert grid.box_xyxy_px == (0, 0, 378, 378)
    mask = np.zeros((384, 384))
    mask[26 * 14 : 378, 25 * 14 : 26 * 14] = 1  # the last row but for what is unseen, the last column but one
    covered = token_coverage_of_regions([rle_of(mask)], (384, 384), grid)[0]
    assert covered[26, 25] == pytest.approx(1, abs=1e-12) and covered.sum() == pytest.approx(1, abs=1e-12)
    mask[:] = 0
    mask[378:] = 1
    assert token_coverage_of_regions([rle_of(mask)], (384, 384), grid).sum() == 0


def test_half_covered_counts_as_half() -> None:
    """Thresholds are inclusive, so a cell that is covered by half must not fall below by a rounding error."""
    for width in range(3, 200, 7):
        mask = np.zeros((2 * width, width))
        mask[:width] = 1
        grid = square_grid((width, 2 * width), "squeeze", (3, 1), 336)
        assert covered_tokens_of_regions([rle_of(mask)], (width, 2 * width), grid)[0].tolist() == [True, True, False]


@given(oracles)
def test_cells_sum_to_the_visible_area_of_the_image(oracle: ImageGeometry) -> None:
    width, height = oracle.original_wh
    grid = cells_of(oracle)
    left, top, right, bottom = grid.box_xyxy_px
    visible = max(0, min(right, width) - max(left, 0)) * max(0, min(bottom, height) - max(top, 0))
    coverage = token_coverage_of_regions([rle_of(np.ones((height, width)))], (width, height), grid)
    cell_area = (right - left) * (bottom - top) / (grid.rows * grid.cols)
    assert coverage.sum() * cell_area == pytest.approx(visible, rel=1e-9, abs=1e-9)
    assert coverage.max() <= 1 + 1e-12


def test_equal_views_share_one_layout() -> None:
    """`masks` keeps its tables by grid, so images of one size must share it."""
    processor = CLIPImageProcessorPil()
    views = [image_view_of((640, 480), processor, "pad", (16, 16)) for _ in range(2)]
    assert layout_of(views[0]) is layout_of(views[1])


def test_tokens_are_row_major_unless_they_are_given() -> None:
    grid = TokenGrid((4, 6), (0, 2, 4), (0, 3, 6))
    assert grid.tokens.tolist() == [[0, 1], [2, 3]]
    columns_first = TokenGrid((4, 6), (0, 2, 4), (0, 3, 6), np.array([[0, 2], [1, 3]]), "tiles")
    assert columns_first.tokens[1, 0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_edges": (0, 2, 2)}, "x_edges: found"),
        ({"y_edges": (0,)}, "y_edges: found"),
        ({"tokens": np.arange(4)}, r"tokens: found shape \(4,\), expected \(2, 2\)"),
    ],
)
def test_impossible_grids_are_refused(change: dict[str, Any], message: str) -> None:
    edges = {"x_edges": (0, 2, 4), "y_edges": (0, 3, 6)}
    with pytest.raises(ValueError, match=message):
        TokenGrid((4, 6), **edges | change)


@given(sizes, st.lists(st.floats(-10, 70), min_size=4, max_size=4))
def test_square01_is_the_pad_geometry_of_side_one(size_wh: tuple[int, int], box: list[float]) -> None:
    square01 = boxes_xyxy_to_square01(box, size_wh)
    in_square = ImageGeometry.of("pad", size_wh, 1, (1, 1)).boxes_xyxy_to_model(box)
    np.testing.assert_allclose(square01, in_square, atol=1e-9)
    np.testing.assert_allclose(boxes_xyxy_from_square01(square01, size_wh), box, atol=1e-9)


def test_both_frames_agree_on_square_images_only() -> None:
    box01 = [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_array_equal(boxes_xyxy_from_image01(box01, (40, 20)), [10, 10, 30, 20])
    np.testing.assert_array_equal(boxes_xyxy_from_square01(box01, (40, 20)), [10, 10, 30, 30])
    np.testing.assert_array_equal(boxes_xyxy_from_image01(box01, (24, 24)), boxes_xyxy_from_square01(box01, (24, 24)))
    np.testing.assert_array_equal(boxes_xyxy_to_square01([0, 0, 40, 20], (40, 20)), [0, 0.25, 1, 0.75])
