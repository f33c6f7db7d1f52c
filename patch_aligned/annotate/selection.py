"""Which candidates become labels: thresholds, non-maximum suppression, and what a label is called.

The recipe of the reference: boxes whose score is above 0.25, of those that overlap by more than 0.5 only the one with
the highest score, whatever they show, and for a label the tokens above 0.2. No model is needed for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from patch_aligned.annotate.candidates import Candidate, CandidateThresholds

LabelMode = Literal["phrase", "best_tag"]

_LABEL_KEYS = ("tag", "bbox", "score", "phrase", "best_tag", "best_tag_score", "candidate")


class SelectionError(ValueError):
    """Thresholds out of range, or below those at which the candidates were kept."""


@dataclass(frozen=True)
class Selection:
    """How candidates are chosen and named.

    Attributes:
        box_threshold: a candidate's score has to be above it.
        text_threshold: a token's score has to be above it to be in the phrase.
        nms_iou: of two boxes with a higher intersection over union the one with the lower score goes.
        label_mode: `phrase` names a region by the tokens above `text_threshold`, as Grounding DINO does (by the best
            tag where there are none); `best_tag` always by the tag that fits best.
        min_box_area_px: boxes with a smaller area within the image go.
    """

    box_threshold: float = 0.25
    text_threshold: float = 0.2
    nms_iou: float = 0.5
    label_mode: LabelMode = "phrase"
    min_box_area_px: float = 1.0

    def __post_init__(self) -> None:
        for name in ("box_threshold", "text_threshold", "nms_iou"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise SelectionError(f"{name}: found {value}, expected 0 to 1")
        if not self.min_box_area_px >= 0:
            raise SelectionError(f"min_box_area_px: found {self.min_box_area_px}, expected 0 or more")
        if self.label_mode not in get_args(LabelMode):
            raise SelectionError(
                f"label_mode: found {self.label_mode!r}, expected one of {', '.join(get_args(LabelMode))}"
            )

    def require_within(self, kept: CandidateThresholds) -> None:
        """Checks that nothing is asked for that was never kept.

        Raises:
            SelectionError: a threshold below that of the candidates.
        """
        for name, value, floor in (
            ("box_threshold", self.box_threshold, kept.box),
            ("text_threshold", self.text_threshold, kept.text),
        ):
            if value < floor:
                raise SelectionError(
                    f"{name}: found {value}, expected {floor} or more, the threshold at which candidates were kept. "
                    f"Annotate with a lower --candidate_{name}"
                )


class Selected(NamedTuple):
    """A candidate that becomes a label.

    Attributes:
        position: in the image's candidates.
        candidate: that one.
        tag: what the region is called.
        phrase: the tokens above the text threshold, perhaps none.
    """

    position: int
    candidate: Candidate
    tag: str
    phrase: str

    def to_label(self, mask: Mapping[str, Any]) -> dict[str, Any]:
        """The label of a PAD record.

        Args:
            mask: `rle_mask`, and whatever else is known of the mask.
        """
        return {
            "tag": self.tag,
            "bbox": list(self.candidate.bbox_xyxy_px),
            "rle_mask": mask["rle_mask"],
            "score": self.candidate.score,
            "phrase": self.phrase,
            "best_tag": self.candidate.best_tag,
            "best_tag_score": self.candidate.best_tag_score,
            "candidate": self.position,
            **mask,
        }


def mask_of_label(label: Mapping[str, Any]) -> dict[str, Any]:
    """The `mask` that `to_label` was given."""
    return {key: value for key, value in label.items() if key not in _LABEL_KEYS}


def select(candidates: Sequence[Candidate], selection: Selection, size_wh: tuple[int, int]) -> list[Selected]:
    """The candidates that become labels, highest score first.

    Args:
        candidates: of one image.
        selection: how to choose.
        size_wh: of the image in pixels.
    """
    likely = [
        position
        for position, candidate in enumerate(candidates)
        if candidate.score > selection.box_threshold
        and _area_within(candidate.bbox_xyxy_px, size_wh) >= selection.min_box_area_px
    ]
    boxes = np.array([candidates[position].bbox_xyxy_px for position in likely], dtype=np.float64).reshape(-1, 4)
    scores = np.array([candidates[position].score for position in likely], dtype=np.float64)
    selected = []
    for kept in non_maximum_suppression(boxes, scores, selection.nms_iou):
        candidate = candidates[likely[kept]]
        phrase = candidate.phrase(selection.text_threshold)
        tag = candidate.best_tag if selection.label_mode == "best_tag" or not phrase else phrase
        selected.append(Selected(likely[kept], candidate, tag, phrase))
    return selected


def non_maximum_suppression(boxes_xyxy: np.ndarray, scores: np.ndarray, iou_threshold: float) -> list[int]:
    """Boxes that don't overlap with a better one that is kept.

    Args:
        boxes_xyxy: `[n, 4]`.
        scores: `[n]`; of equal ones the first counts as better.
        iou_threshold: a box goes where its intersection over union with a better one is above it.

    Returns:
        Positions of the boxes kept, best first. Equals `torchvision.ops.nms`.
    """
    order = np.argsort(-scores, kind="stable")
    boxes = boxes_xyxy[order]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])  # [n]
    is_kept = np.ones(len(order), dtype=bool)
    for rank in range(len(order)):
        if not is_kept[rank]:
            continue
        worse = slice(rank + 1, None)
        sides = np.minimum(boxes[rank, 2:], boxes[worse, 2:]) - np.maximum(boxes[rank, :2], boxes[worse, :2])
        intersection = sides.clip(min=0).prod(axis=1)  # [n - rank - 1]
        union = areas[rank] + areas[worse] - intersection
        iou = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
        is_kept[worse] &= iou <= iou_threshold
    return order[is_kept].tolist()


def _area_within(bbox_xyxy_px: Sequence[float], size_wh: tuple[int, int]) -> float:
    x1, y1, x2, y2 = bbox_xyxy_px
    return max(0.0, min(x2, size_wh[0]) - max(x1, 0.0)) * max(0.0, min(y2, size_wh[1]) - max(y1, 0.0))
