"""Functions that lmms-eval calls for the `mini_*` tasks. It loads this file from the folder of the YAMLs."""

from __future__ import annotations

from typing import Any

from PIL import Image

from eval.mini.scoring import YesNo, score_count, score_existence, score_short
from eval.mini.scoring import f1_of_yes as existence_f1  # noqa: F401 - of all rows of `mini_existence`
from eval.rec.boxes import score_answer


def doc_to_visual(row: dict[str, Any]) -> list[Image.Image]:
    """The scene."""
    return [row["image"].convert("RGB")]


def short_results(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Of `mini_colour` and `mini_position`."""
    return score_short(answers[0], row["answer"])


def counting_results(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Of `mini_counting`."""
    return score_count(answers[0], row["answer"])


def existence_results(row: dict[str, Any], answers: list[str]) -> dict[str, float | YesNo]:
    """Of `mini_existence`."""
    return score_existence(answers[0], row["answer"])


def rec_results(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Of `mini_rec`: both readings of the box."""
    return score_answer(answers[0], row["box_xyxy_px"], row["width"], row["height"])
