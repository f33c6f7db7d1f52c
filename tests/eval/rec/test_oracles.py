"""Perfect answerers: each reading is exact for answers spoken in its frame, and loses what it must in the other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eval.hub import shipped_tasks_folder
from eval.rec.boxes import ACCURACY, MEAN_IOU, score_answer
from patch_aligned.cells import boxes_xyxy_to_square01

SIZES = [(640, 480), (480, 640), (640, 427), (427, 640), (640, 360), (360, 640), (500, 500), (640, 107), (641, 480),
         (33, 7)]  # fmt: skip
SIDES = (0.15, 0.3, 0.5, 0.8)


def boxes_on_a_grid(size_wh: tuple[int, int], side: float, count: int = 9) -> list[list[float]]:
    """Boxes of `side` times the image's width and height at count x count places, edge to edge; pixels."""
    width, height = size_wh
    starts = np.linspace(0, 1 - side, count)
    return [[x * width, y * height, (x + side) * width, (y + side) * height] for x in starts for y in starts]


def in_square(box_xyxy_px: list[float], size_wh: tuple[int, int]) -> list[float]:
    return boxes_xyxy_to_square01(box_xyxy_px, size_wh).tolist()


def in_image(box_xyxy_px: list[float], size_wh: tuple[int, int]) -> list[float]:
    return [value / length for value, length in zip(box_xyxy_px, size_wh * 2, strict=True)]


SPEAKERS = {"square": in_square, "image": in_image}


def exact(numbers: list[float]) -> str:
    return f"[{', '.join(f'{number:.17g}' for number in numbers)}]"


def two_decimals(numbers: list[float]) -> str:
    return f"[{', '.join(str(round(number, 2)) for number in numbers)}]"


def mean_scores(size_wh: tuple[int, int], side: float, speak: Callable[..., Any], write: Callable[..., str]) -> Any:
    scores = [score_answer(write(speak(box, size_wh)), box, *size_wh) for box in boxes_on_a_grid(size_wh, side)]
    return {metric: np.mean([score[metric] for score in scores]) for metric in scores[0]}


@pytest.mark.parametrize("frame", ["square", "image"])
@pytest.mark.parametrize("size_wh", SIZES, ids=str)
def test_a_perfect_answerer_is_perfect_in_its_own_frame(size_wh: tuple[int, int], frame: Any) -> None:
    for side in SIDES:
        scores = mean_scores(size_wh, side, SPEAKERS[frame], exact)
        assert scores[ACCURACY[frame]] == 1
        assert scores[MEAN_IOU[frame]] == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("frame", ["square", "image"])
@pytest.mark.parametrize("size_wh", [size for size in SIZES if size[0] != size[1]], ids=str)
def test_a_perfect_answerer_loses_in_the_other_frame(size_wh: tuple[int, int], frame: Any) -> None:
    other: Any = {"square": "image", "image": "square"}[frame]
    small = mean_scores(size_wh, 0.15, SPEAKERS[frame], exact)
    assert small[ACCURACY[other]] < 0.4
    assert small[MEAN_IOU[other]] < 0.45


@pytest.mark.parametrize("frame", ["square", "image"])
@pytest.mark.parametrize("size_wh", SIZES[:8], ids=str)
def test_two_decimals_keep_every_box_of_at_least_35_thousandths(size_wh: tuple[int, int], frame: Any) -> None:
    """Rounding moves each edge by up to 0.005; inwards on all sides it leaves (1 - 0.01 / s)^2 of a box of side s.

    That is at least half from s = 0.0342 on. Smaller boxes may be lost by their spelling alone.
    """
    rng = np.random.default_rng(0)
    frame_wh = (max(size_wh),) * 2 if frame == "square" else size_wh
    smallest_wh = [0.035 * length for length in frame_wh]
    for _ in range(300):
        box_wh = [rng.uniform(least, length) for least, length in zip(smallest_wh, size_wh, strict=True)]
        x, y = (rng.uniform(0, length - side) for length, side in zip(size_wh, box_wh, strict=True))
        box = [x, y, x + box_wh[0], y + box_wh[1]]
        assert score_answer(two_decimals(SPEAKERS[frame](box, size_wh)), box, *size_wh)[ACCURACY[frame]] == 1


def test_two_decimals_may_lose_a_smaller_box() -> None:
    tiny = [355.0, 355.0, 364.9, 364.9]  # spoken as 0.35 to 0.36 or 0.36 to 0.36
    assert score_answer(two_decimals(in_square(tiny, (1000, 1000))), tiny, 1000, 1000)[ACCURACY["square"]] == 0


@pytest.fixture(scope="module")
def shipped() -> Any:
    """lmms-eval's own scorer, loaded from its file as lmms-eval loads it."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is part of the extra `eval`")
    path = shipped_tasks_folder() / "refcoco" / "utils_rec.py"
    spec = importlib.util.spec_from_file_location("shipped_utils_rec", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# (width, height): side -> (acc@0.5, mean IoU) of a perfect answerer in the padded square under the shipped rule.
SHIPPED_LOSS: dict[tuple[int, int], Any] = {
    (640, 480): {0.15: (0.33, 0.41), 0.3: (0.98, 0.65), 0.5: (1.00, 0.75), 0.8: (1.00, 0.75)},
    (640, 427): {0.15: (0.33, 0.26), 0.3: (0.59, 0.54), 0.5: (1.00, 0.66), 0.8: (1.00, 0.66)},
    (640, 360): {0.15: (0.11, 0.17), 0.3: (0.33, 0.41), 0.5: (1.00, 0.56), 0.8: (1.00, 0.56)},
    (500, 500): dict.fromkeys(SIDES, (1.00, None)),
}


@pytest.mark.parametrize("size_wh", SHIPPED_LOSS, ids=str)
def test_the_shipped_rule_loses_what_is_known_of_it_and_ours_says_the_same(size_wh: Any, shipped: Any) -> None:
    for side, (accuracy, mean_iou) in SHIPPED_LOSS[size_wh].items():
        results, ours = [], []
        for box in boxes_on_a_grid(size_wh, side):
            answer = two_decimals(in_square(box, size_wh))
            row = {"question_id": "0", "answer": "it", "bbox": in_image(box, size_wh)}
            results.append(shipped.refcoco_bbox_rec_process_result(row, [answer])["refcoco_ACC@0.5"])
            ours.append(score_answer(answer, box, *size_wh))
        shipped_accuracy = shipped.refcoco_bbox_rec_acc05(results)
        assert shipped_accuracy == pytest.approx(accuracy, abs=0.03)
        assert shipped_accuracy == np.mean([scores[ACCURACY["image"]] for scores in ours])
        shipped_iou = shipped.refcoco_bbox_rec_iou(results)
        assert shipped_iou == pytest.approx(np.mean([scores[MEAN_IOU["image"]] for scores in ours]), rel=1e-9)
        if mean_iou is not None:
            assert shipped_iou == pytest.approx(mean_iou, abs=0.01)
        assert np.mean([scores[ACCURACY["square"]] for scores in ours]) == 1
