"""Referring expressions: a box read out of an answer, and scored under both frames that it may have been spoken in.

LLaVA-1.5 was trained on boxes in 0..1 of the image *padded to a centred square*, so that is how its answers are to be
read; much of the literature reads them in 0..1 of the image itself. The two agree on square images only. Every answer
is scored both ways, so that a run never has to be repeated to learn what the other reading would have given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llava.image_geometry import boxes_xyxy_from_image01, boxes_xyxy_from_square01
from patch_aligned.results.box_frames import ACCURACY, BoxFrame

BoxXyxy = tuple[float, float, float, float]

MEAN_IOU: dict[BoxFrame, str] = {
    "square": "mean IoU padded frame undone",
    "image": "mean IoU read in image frame",
}
NOT_PARSED = "not parsed"
METRICS = (*ACCURACY.values(), *MEAN_IOU.values(), NOT_PARSED)
MIN_IOU = 0.5

# At most nine digits before the point: a longer number is no coordinate, and its box's area could overflow.
_NUMBER = r"\s*(-?(?:\d{1,9}(?:\.\d*)?|\.\d+))\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]", re.ASCII)


def parse_box(text: str) -> BoxXyxy | None:
    """The first `[x1, y1, x2, y2]` anywhere in an answer; None where there is none.

    Numbers may lack the digit before the point (`.25`) or after it (`1.`). Any two opposite corners name a box, so that
    swapped ones are put in order. Numbers outside 0..1 are kept: such an answer is wrong, not unreadable.
    """
    match = _BOX.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in match.groups())
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def box_iou(a_xyxy: Sequence[float], b_xyxy: Sequence[float]) -> float:
    """Area of the intersection of two boxes over the area of their union; 0 where both are empty."""
    width = min(a_xyxy[2], b_xyxy[2]) - max(a_xyxy[0], b_xyxy[0])
    height = min(a_xyxy[3], b_xyxy[3]) - max(a_xyxy[1], b_xyxy[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = _area(a_xyxy) + _area(b_xyxy) - intersection
    return intersection / union if union > 0 else 0.0


def _area(box_xyxy: Sequence[float]) -> float:
    return (box_xyxy[2] - box_xyxy[0]) * (box_xyxy[3] - box_xyxy[1])


def score_answer(text: str, box_xyxy_px: Sequence[float], width: int, height: int) -> dict[str, float]:
    """Scores of one answer under both readings.

    Args:
        text: the raw answer.
        box_xyxy_px: the box asked for, in pixels of the image file.
        width: of the image file, pixels.
        height: of the image file, pixels.

    Returns:
        A number for each name of `METRICS`. An answer is right from an IoU of 0.5 on. One without a box is wrong, with
        an IoU of 0, in both readings, and counts as 1 in "not parsed". Boxes are not clipped to the image.
    """
    spoken = parse_box(text)
    if spoken is None:
        return {**dict.fromkeys(METRICS, 0.0), NOT_PARSED: 1.0}
    iou = {
        "square": box_iou(boxes_xyxy_from_square01(spoken, (width, height)).tolist(), box_xyxy_px),
        "image": box_iou(boxes_xyxy_from_image01(spoken, (width, height)).tolist(), box_xyxy_px),
    }
    return {
        **{ACCURACY[frame]: float(iou[frame] >= MIN_IOU) for frame in ACCURACY},
        **{MEAN_IOU[frame]: iou[frame] for frame in MEAN_IOU},
        NOT_PARSED: 0.0,
    }
