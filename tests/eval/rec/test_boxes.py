"""Boxes are read out of answers, and an answer is scored in both frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.rec.boxes import ACCURACY, MEAN_IOU, METRICS, NOT_PARSED, parse_box, score_answer
from patch_aligned.cells import box_iou

SPOKEN = {
    "[0.25, 0.5, 0.75, 1.0]": (0.25, 0.5, 0.75, 1.0),
    "[.25,.5,.75,1.]": (0.25, 0.5, 0.75, 1.0),
    "[0, 0, 1, 1]": (0.0, 0.0, 1.0, 1.0),
    "It is at [ 0.1 ,0.2,\n0.3, 0.4 ], I think.": (0.1, 0.2, 0.3, 0.4),
    "[[0.1, 0.2, 0.3, 0.4]]": (0.1, 0.2, 0.3, 0.4),
    "[0.1, 0.2] or [0.1, 0.2, 0.3, 0.4] or [0.5, 0.5, 0.6, 0.6]": (0.1, 0.2, 0.3, 0.4),
    "[0.3, 0.4, 0.1, 0.2]": (0.1, 0.2, 0.3, 0.4),  # bottom right corner first
    "[0.3, 0.2, 0.1, 0.4]": (0.1, 0.2, 0.3, 0.4),  # top right corner first
    "[-0.1, 0.2, 1.3, 240]": (-0.1, 0.2, 1.3, 240.0),  # outside 0..1: wrong, not unreadable
}
UNREADABLE = ["", "on the left", "[0.1, 0.2, 0.3]", "[0.1, 0.2, 0.3, 0.4, 0.5]", "[0.1, 0.2, 0.3, 0.4", "[., 0, 0, 1]",
              "0.1, 0.2, 0.3, 0.4", "(0.1, 0.2, 0.3, 0.4)", "[x1, y1, x2, y2]", "[nan, 0, 1, 1]", "[0 0 1 1]",
              f"[0, 0, 1, {'9' * 400}]", "[٠, ٠, ١, ١]"]  # fmt: skip


@pytest.mark.parametrize("text", SPOKEN)
def test_a_box_is_found_in_an_answer(text: str) -> None:
    assert parse_box(text) == SPOKEN[text]


@pytest.mark.parametrize("text", UNREADABLE)
def test_an_answer_without_a_box_is_wrong_in_both_frames_and_counted(text: str) -> None:
    assert parse_box(text) is None
    scores = score_answer(text, [0, 0, 10, 10], 10, 10)
    assert scores == {**dict.fromkeys(METRICS, 0.0), NOT_PARSED: 1.0}


@given(st.text(st.sampled_from("0123456789.-,[]() \n"), max_size=60))
def test_any_text_gives_an_ordered_box_or_none_and_finite_scores(text: str) -> None:
    box = parse_box(text)
    assert box is None or (box[0] <= box[2] and box[1] <= box[3])
    scores = score_answer(text, [2, 3, 20, 12], 40, 20)
    assert set(scores) == set(METRICS)
    assert all(0 <= score <= 1 for score in scores.values())
    assert scores[NOT_PARSED] == (box is None)


numbers = st.floats(0, 1).map(lambda value: round(value, 2))


@given(st.tuples(numbers, numbers, numbers, numbers), st.text(st.characters(exclude_characters="[]"), max_size=20))
def test_what_was_spoken_is_what_is_read(corners: tuple[float, ...], chatter: str) -> None:
    box = parse_box(f"{chatter}[{', '.join(map(str, corners))}]{chatter}")
    x1, y1, x2, y2 = corners
    assert box == (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


pixels = st.tuples(*[st.integers(0, 12)] * 4).map(lambda c: (min(c[:2]), min(c[2:]), max(c[:2]) + 1, max(c[2:]) + 1))


@given(pixels, pixels)
def test_iou_counts_pixels(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    masks = np.zeros((2, 14, 14), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, (a, b), strict=True):
        mask[y1:y2, x1:x2] = True
    assert box_iou(a, b) == (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()


def test_an_iou_of_exactly_half_is_right() -> None:
    half, less = "[0, 0, 0.5, 1]", "[0, 0, 0.499, 1]"
    assert score_answer(half, [0, 0, 10, 10], 10, 10)[ACCURACY["image"]] == 1
    assert score_answer(less, [0, 0, 10, 10], 10, 10)[ACCURACY["image"]] == 0
    # 0.3 * 10 - 0.1 * 10 is 2 but for the last digit
    assert score_answer("[0.1, 0, 0.3, 1]", [1, 0, 5, 10], 10, 10)[ACCURACY["image"]] == 1
    for x in range(1, 50):  # half of [0, 2x], at every place that two decimals can say
        scores = score_answer(f"[{x / 100}, 0, {2 * x / 100}, 1]", [0, 0, 2 * x * 6.4, 480], 640, 480)
        assert scores[ACCURACY["image"]] == 1, x


def test_empty_boxes_overlap_with_nothing() -> None:
    assert box_iou([1, 1, 1, 1], [1, 1, 1, 1]) == 0
    assert score_answer("[0.5, 0.5, 0.5, 0.5]", [0, 0, 10, 10], 10, 10)[MEAN_IOU["square"]] == 0
