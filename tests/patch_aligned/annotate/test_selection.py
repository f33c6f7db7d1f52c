"""Which candidates become labels, and what they are called."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from patch_aligned.annotate.options import CandidateThresholds, Selection
from patch_aligned.annotate.regions import Candidate, box_ious, mask_of_label, non_maximum_suppression, select
from patch_aligned.masks import rle_of_mask

SIZE_WH = (100, 80)


def candidate(score: float, box: tuple[float, ...] = (10, 10, 50, 50), **changes: Any) -> Candidate:
    fields: dict[str, Any] = {"best_tag": "tennis racket", "best_tag_score": 0.3, "tokens": (("racket", score),)}
    return Candidate(bbox_xyxy_px=box, score=score, **(fields | changes))  # type: ignore[arg-type]


def brute_force_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    """By the definition, one pair at a time, with plain numbers."""
    kept: list[int] = []
    for new in sorted(range(len(boxes)), key=lambda position: -scores[position]):
        a = boxes[new].tolist()
        for better in kept:
            b = boxes[better].tolist()
            sides = [min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])]
            both = max(sides[0], 0.0) * max(sides[1], 0.0)
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
            if union > 0 and both / union > threshold:
                break
        else:
            kept.append(new)
    return kept


# Few different numbers, so that overlaps at the threshold, equal scores and boxes without area are common.
@st.composite
def boxes_and_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    count = draw(st.integers(0, 30))
    points = draw(numpy_strategies.arrays(np.float64, (count, 2, 2), elements=st.integers(0, 6)))
    scores = draw(numpy_strategies.arrays(np.float64, count, elements=st.sampled_from([0.2, 0.3, 0.4, 0.5])))
    return np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1), scores


@given(boxes_and_scores(), st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.7, 1.0]))
@example((np.zeros((0, 4)), np.zeros(0)), 0.5)
def test_nms_equals_brute_force_and_torchvision(drawn: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    boxes, scores = drawn
    kept = non_maximum_suppression(box_ious(boxes), scores, threshold)
    assert kept == brute_force_nms(boxes, scores, threshold)
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is part of the extra `annotate`")
    assert kept == ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold).tolist()


def test_nms_keeps_the_first_of_equal_boxes_and_an_overlap_at_the_threshold() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 6]], dtype=float)
    ious, scores = box_ious(boxes), np.array([0.5, 0.5, 0.4, 0.3])
    assert non_maximum_suppression(ious, scores, 0.5) == [0, 2]
    assert non_maximum_suppression(ious, scores, 1.0) == [0, 1, 2, 3]


def test_overlapping_boxes_suppress_each_other_whatever_they_show() -> None:
    found = [candidate(0.3, best_tag="cat"), candidate(0.8, (11, 10, 50, 50)), candidate(0.5, (60, 10, 90, 50))]
    assert select(found, Selection(), SIZE_WH) == [1, 2]


def test_scores_have_to_be_above_the_threshold() -> None:
    found = [candidate(0.25), candidate(0.250001, (60, 10, 90, 50))]
    assert select(found, Selection(), SIZE_WH) == [1]
    assert select(found, Selection(box_threshold=0.3), SIZE_WH) == []
    assert select([], Selection(), SIZE_WH) == []


def test_an_unlikely_box_suppresses_nothing() -> None:
    found = [candidate(0.2, (0, 0, 50, 50)), candidate(0.9, (0, 0, 50, 49))]
    assert select(found, Selection(), SIZE_WH) == [1]


def test_the_area_counts_within_the_image() -> None:
    found = [candidate(0.9, (-50, 0, 5, 10)), candidate(0.8, (90, 0, 101, 10))]  # 50 and 100 px in it
    assert select(found, Selection(min_box_area_px=100), SIZE_WH) == [1]
    assert len(select(found, Selection(), SIZE_WH)) == 2


@pytest.mark.parametrize(
    ("label_mode", "text_threshold", "tag", "phrase"),
    [
        ("phrase", 0.2, "tennis racket", "tennis racket"),
        ("phrase", 0.5, "racket", "racket"),
        ("phrase", 0.7, "tennis racket", ""),  # no token is above it: the best tag
        ("best_tag", 0.5, "tennis racket", "racket"),
    ],
)
def test_a_region_is_named_by_phrase_or_by_best_tag(
    label_mode: Any, text_threshold: float, tag: str, phrase: str
) -> None:
    found = candidate(0.6, tokens=(("tennis", 0.4), ("racket", 0.6)))
    label = found.to_label(0, Selection(text_threshold=text_threshold, label_mode=label_mode), {"rle_mask": ""})
    assert (label["tag"], label["phrase"]) == (tag, phrase)


def test_a_label_has_both_names_their_scores_and_its_mask() -> None:
    mask = {"rle_mask": "0`o0", "area_px": 3, "predicted_iou": 0.5}
    label = candidate(0.6).to_label(1, Selection(), mask)
    assert label == {
        "tag": "racket", "bbox": [10, 10, 50, 50], "score": 0.6, "phrase": "racket", "best_tag": "tennis racket",
        "best_tag_score": 0.3, "candidate": 1, **mask,
    }  # fmt: skip
    assert mask_of_label(label) == mask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box_threshold": 1.5}, "box_threshold: found 1.5, expected 0 to 1"),
        ({"nms_iou": float("nan")}, "nms_iou: found nan"),
        ({"min_box_area_px": -1}, "min_box_area_px: found -1, expected 0 or more"),
    ],
)
def test_selections_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**changes)


def test_thresholds_below_those_of_the_candidates_are_refused() -> None:
    Selection(box_threshold=0.15, text_threshold=0.15).require_within(CandidateThresholds())
    with pytest.raises(ValueError, match=r"box_threshold: found 0.1, expected 0.15 or more.*--candidate_box_thre"):
        Selection(box_threshold=0.1).require_within(CandidateThresholds())
    with pytest.raises(ValueError, match=r"text_threshold: found 0\.2, expected 0\.3"):
        Selection().require_within(CandidateThresholds(text=0.3))


@st.composite
def masks_and_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    count = draw(st.integers(0, 12))
    masks = draw(numpy_strategies.arrays(np.bool_, (count, 4, 5), elements=st.booleans()))
    masks[:, 0, 0] = True  # SAM 3's candidates have a pixel
    scores = draw(numpy_strategies.arrays(np.float64, count, elements=st.sampled_from([0.2, 0.3, 0.4, 0.5])))
    return masks, scores


@given(masks_and_scores(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_candidates_that_came_with_masks_overlap_by_them_and_the_better_stays(
    drawn: tuple[np.ndarray, np.ndarray], threshold: float
) -> None:
    masks, scores = drawn
    expected: list[int] = []
    for new in sorted(range(len(masks)), key=lambda position: -scores[position]):  # of equal ones the first stays
        ious = [(masks[new] & masks[better]).sum() / (masks[new] | masks[better]).sum() for better in expected]
        if scores[new] > 0.25 and all(iou <= threshold for iou in ious):
            expected.append(new)
    candidates = [
        candidate(score, (0, 0, 5, 4), mask={"rle_mask": rle_of_mask(mask)})
        for mask, score in zip(masks, scores.tolist(), strict=True)
    ]
    assert select(candidates, Selection(nms_iou=threshold), (5, 4)) == expected
    assert all("mask" not in one.to_record() for one in candidates)
