"""Functions that lmms-eval calls for the `rec_*` tasks. It loads this file from the folder of the YAMLs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from eval.rec.boxes import Row, load_image, prompt_of, score_answer


def doc_to_visual(row: Row, settings: dict[str, Any]) -> list[Image.Image]:
    """The row's picture; `settings` are the task's `lmms_eval_specific_kwargs`."""
    return [load_image(row, Path(settings["data_root"]))]


def doc_to_text(row: Row, settings: dict[str, Any]) -> str:
    """The question in the words of LLaVA-1.5's training data."""
    return prompt_of(row["expression"])


def process_results(row: Row, answers: list[str]) -> dict[str, float]:
    """Both readings of the answer."""
    return score_answer(answers[0], row["box_xyxy_px"], row["width"], row["height"])
