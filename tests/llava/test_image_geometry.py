"""The geometry against the real image processor, and its areas against exact rational arithmetic."""

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

from llava.image_geometry import (
    ImageGeometry,
    boxes_xyxy_from_image01,
    boxes_xyxy_from_square01,
    boxes_xyxy_to_square01,
    get_anyres_image_grid_shape,
    letterboxed_wh,
    select_best_resolution,
)
from llava.mm_utils import image_geometry_of, process_images

MODES = ("square", "pad", "anyres")
SIZES = [(448, 336), (336, 448), (640, 480), (333, 500), (501, 333), (97, 61), (336, 336), (20, 31), (90, 400)]

sizes = st.tuples(st.integers(1, 60), st.integers(1, 60))
geometries = st.builds(
    ImageGeometry.of,
    st.sampled_from(MODES),
    sizes,
    st.sampled_from([14, 28, 30]),
    st.sampled_from([(2, 2), (7, 7), (3, 5), (4, 1)]),
    st.sampled_from([None, 16, 32]),
)


def exact_coverage(geometry: ImageGeometry, mask: np.ndarray) -> list[list[Fraction]]:
    """Coverage by definition, pixel by pixel and cell by cell, in rational numbers and the model's frame."""
    width, height = geometry.original_wh
    rows, cols = geometry.grid

    def model(axis, position: int) -> Fraction:
        return Fraction((position + axis.pad) * axis.resized, axis.canvas) - axis.cut

    def overlaps(axis, length: int, cells: int) -> list[list[Fraction]]:
        cell = Fraction(geometry.side, cells)
        return [
            [
                max(Fraction(0), min(model(axis, i + 1), cell * (k + 1)) - max(model(axis, i), cell * k)) / cell
                for i in range(length)
            ]
            for k in range(cells)
        ]

    x, y = geometry.axes
    across, down = overlaps(x, width, cols), overlaps(y, height, rows)
    pixels = list(zip(*np.nonzero(mask), strict=True))
    return [
        [sum((down[r][j] * across[c][i] for j, i in pixels), Fraction(0)) for c in range(cols)] for r in range(rows)
    ]


@pytest.mark.parametrize("shortest_edge", [112, 131])
@pytest.mark.parametrize("aspect_ratio", [None, *MODES])
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
    geometry = image_geometry_of(size_wh, processor, aspect_ratio, (8, 8))
    assert edges_checked(processor, geometry, aspect_ratio) or min(size_wh) < 40


@pytest.mark.parametrize("processor_class", [SiglipImageProcessorPil, DINOv3ViTImageProcessor])
@pytest.mark.parametrize("aspect_ratio", [None, *MODES])
@pytest.mark.parametrize("size_wh", SIZES)
def test_edges_land_where_a_squeezing_processor_puts_them(
    aspect_ratio: str | None, size_wh: tuple[int, int], processor_class: Any
) -> None:
    """SigLIP's and DINOv3's processors keep no aspect ratio; of 112 pixels, 8 patches of 13 leave 8 unseen."""
    square = {"height": 112, "width": 112}
    processor = processor_class(size=square, image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0])
    geometry = image_geometry_of(size_wh, processor, aspect_ratio, (8, 8), seen_side=104)
    assert geometry.mode == ("pad" if aspect_ratio == "pad" else "squeeze")
    # DINOv3's bilinear kernel keeps areas less exactly where it enlarges.
    tolerance = 0.04 if processor_class is SiglipImageProcessorPil else 0.08
    assert edges_checked(processor, geometry, aspect_ratio, tolerance) or min(size_wh) < 40


def edges_checked(processor: Any, geometry: ImageGeometry, aspect_ratio: str | None, tolerance: float = 0.04) -> int:
    """Follows the edges of bright half-planes on grey; how many were found where the geometry says.

    The bright area in the processed image tells where an edge has gone.
    """
    size_wh, side = geometry.original_wh, geometry.side
    config = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=[[112, 112]])
    checked = 0
    for axis, length in enumerate(size_wh):
        scale, offset = geometry.scale_xy[axis], geometry.offset_xy[axis]
        across = 1 - axis
        middle = int(size_wh[across] / 2 * geometry.scale_xy[across] + geometry.offset_xy[across])
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


@settings(max_examples=60, deadline=None)
@given(geometries, st.randoms(use_true_random=False))
def test_coverage_equals_rational_arithmetic(geometry: ImageGeometry, random) -> None:
    width, height = geometry.original_wh
    mask = np.array([[random.random() < 0.4 for _ in range(width)] for _ in range(height)])
    expected = np.array([[float(share) for share in row] for row in exact_coverage(geometry, mask)])
    np.testing.assert_allclose(geometry.token_coverage(mask), expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MODES), st.integers(2, 20), st.integers(2, 20), st.integers(0, 2**31))
def test_coverage_agrees_with_supersampling(aspect_ratio: str, width: int, height: int, seed: int) -> None:
    geometry = ImageGeometry.of(aspect_ratio, (width, height), 12, (3, 4))
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    per_axis = 480
    centres = (np.arange(per_axis) + 0.5) * 12 / per_axis
    original = geometry.points_from_model(np.stack(np.meshgrid(centres, centres), -1))
    x, y = np.floor(original[..., 0]).astype(int), np.floor(original[..., 1]).astype(int)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    samples = np.where(inside, mask[y.clip(0, height - 1), x.clip(0, width - 1)], False)
    shares = samples.reshape(3, per_axis // 3, 4, per_axis // 4).mean((1, 3))
    np.testing.assert_allclose(geometry.token_coverage(mask), shares, atol=0.04)


@given(geometries)
def test_cells_sum_to_the_visible_area_of_the_image(geometry: ImageGeometry) -> None:
    width, height = geometry.original_wh
    left, top, right, bottom = geometry.boxes_xyxy_to_model([0, 0, width, height]).clip(0, geometry.side)
    visible = (right - left) * (bottom - top)
    everything = np.ones((height, width))
    cell_area = geometry.side**2 / (geometry.grid[0] * geometry.grid[1])
    assert geometry.token_coverage(everything).sum() * cell_area == pytest.approx(visible, rel=1e-9)
    assert geometry.mask_to_model(everything).sum() == pytest.approx(visible, rel=1e-9)
    assert geometry.token_coverage(everything).max() <= 1


@given(geometries, st.lists(st.floats(-100, 100), min_size=4, max_size=4))
def test_boxes_and_points_return_to_where_they_were(geometry: ImageGeometry, box: list[float]) -> None:
    there = geometry.boxes_xyxy_to_model([box])
    np.testing.assert_allclose(geometry.boxes_xyxy_from_model(there), [box], atol=1e-9)
    np.testing.assert_allclose(geometry.points_to_model([box[:2], box[2:]]).ravel(), there[0], atol=1e-9)
    np.testing.assert_allclose(geometry.points_from_model(there.reshape(2, 2)).ravel(), box, atol=1e-9)


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


def test_known_numbers() -> None:
    pad = ImageGeometry.of("pad", (448, 336), 336, (24, 24))
    assert (pad.scale_xy, pad.offset_xy) == ((0.75, 0.75), (0.0, 42.0))
    odd = ImageGeometry.of("pad", (4, 3), 8, (2, 2))
    assert odd.offset_xy == (0.0, 0.0)  # one row of padding: `//` puts it below
    crop = ImageGeometry.of("square", (500, 333), 336, (24, 24))
    assert crop.scale_xy == (504 / 500, 336 / 333)  # 504.5 is truncated
    assert crop.offset_xy == (-84.0, 0.0)
    np.testing.assert_array_equal(boxes_xyxy_to_square01([0, 0, 40, 20], (40, 20)), [0, 0.25, 1, 0.75])


def test_half_covered_is_exactly_half() -> None:
    """Thresholds are inclusive, so a cell that is covered by half must not come out a rounding error below."""
    for width in range(3, 200, 7):
        geometry = ImageGeometry.of("anyres", (width, 2 * width), 336, (3, 1))
        mask = np.zeros((2 * width, width))
        mask[:width] = 1
        assert geometry.token_coverage(mask)[1, 0] == 0.5


def test_a_processor_that_resizes_beyond_its_crop() -> None:
    """DINOv2's processors resize the shortest edge to 256 and cut 224: the border leaves, also in pad mode."""
    geometry = ImageGeometry.of("pad", (256, 256), 224, (16, 16), shortest_edge=256)
    assert (geometry.scale_xy, geometry.offset_xy) == ((1.0, 1.0), (-16.0, -16.0))


def test_what_no_patch_covers_is_outside_the_grid() -> None:
    """SigLIP so400m at 384: 27 patches of 14 pixels end at 378, so a cell is 14 pixels and not 384 / 27."""
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    geometry = image_geometry_of((384, 384), processor, "square", (27, 27), seen_side=378)
    assert (geometry.scale_xy, geometry.offset_xy) == ((1.0, 1.0), (0.0, 0.0))
    mask = np.zeros((384, 384))
    mask[26 * 14 : 378, 25 * 14 : 26 * 14] = 1  # the last row but for what is unseen, the last column but one
    covered = geometry.token_coverage(mask)
    assert covered[26, 25] == 1 and covered.sum() == 1
    mask[:] = 0
    mask[378:] = 1
    assert geometry.token_coverage(mask).sum() == geometry.mask_to_model(mask).sum() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("letterbox", (4, 4), 4, (2, 2)), "image_aspect_ratio: found 'letterbox'"),
        (("pad", (0, 4), 4, (2, 2)), "at least 1"),
        (("pad", (4, 4), 4, (0, 2)), "at least 1"),
    ],
)
def test_impossible_geometries_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageGeometry.of(*arguments)


def test_a_mask_of_another_size_is_refused() -> None:
    geometry = ImageGeometry.of("pad", (8, 4), 4, (2, 2))
    with pytest.raises(ValueError, match=r"found shape \(8, 4\), which is width and height swapped"):
        geometry.token_coverage(np.zeros((8, 4)))
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 4\]"):
        geometry.boxes_xyxy_to_model([1.0, 2.0])


def test_masks_of_many_regions_at_once() -> None:
    geometry = ImageGeometry.of("square", (9, 7), 6, (3, 2))
    masks = np.random.default_rng(0).random((5, 7, 9)) < 0.5
    together = geometry.token_coverage(masks)
    np.testing.assert_array_equal(together, np.stack([geometry.token_coverage(mask) for mask in masks]))


def test_anyres_choices() -> None:
    pinpoints = [(336, 672), (672, 336), (672, 672)]
    assert select_best_resolution((640, 480), pinpoints) == (672, 672)
    assert select_best_resolution((200, 200), pinpoints) == (336, 672)  # a tie in both respects: the first
    assert get_anyres_image_grid_shape((200, 200), str([list(p) for p in pinpoints]), 336) == (1, 2)
    assert letterboxed_wh((100, 30), (50, 50)) == (50, 15)
    assert letterboxed_wh((101, 30), (50, 50)) == (50, 15)  # 14.85 is rounded up
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        get_anyres_image_grid_shape((200, 200), "[[1], [2]]", 336)
