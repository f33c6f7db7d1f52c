"""Captions are kept as they come, and those of another source are joined by the image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.captions.answer_file import AnswerFileError, CaptionLog, read_answers
from eval.captions.references import CaptionedImage

IMAGES = (CaptionedImage("9", "val/9.jpg", ("A dog.",)), CaptionedImage("4", "val/4.jpg", ("Cats.",)))


def write(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_all_processes_captions_of_one_identity_are_read(tmp_path: Path) -> None:
    CaptionLog(tmp_path / "log", "one", 0).keep("a", "A “dog”\n on two lines\u2028")
    CaptionLog(tmp_path / "log", "one", 1).keep("b", "")
    CaptionLog(tmp_path / "log", "other").keep("c", "A car")
    assert CaptionLog(tmp_path / "log", "one").known == {"a": "A “dog”\n on two lines\u2028", "b": ""}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_line_that_was_cut_off_is_lost_and_spoils_no_other(tmp_path: Path, rank: int) -> None:
    log = CaptionLog(tmp_path, "one")
    log.keep("a", "A dog")
    log.keep("b", "Two cats")
    path = tmp_path / "one-0.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    again = CaptionLog(tmp_path, "one", rank)
    assert again.known == {"a": "A dog"}
    again.keep("b", "Two cats")
    assert CaptionLog(tmp_path, "one").known == {"a": "A dog", "b": "Two cats"}


@pytest.mark.parametrize(
    "records",
    [
        [{"image_id": 4, "caption": "Cats"}, {"image_id": 9, "caption": ""}],  # as COCO's server takes them
        [{"image": "val/9.jpg", "answer": ""}, {"image": "val/4.jpg", "answer": "Cats"}],
    ],
)
def test_captions_name_their_image_by_id_or_path(tmp_path: Path, records: list[Any]) -> None:
    assert read_answers(write(tmp_path / "a.json", records), IMAGES) == {"9": "", "4": "Cats"}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"image_id": 7, "caption": "Cats"}], "found captions of 7, which are not among the 2 images"),
        ([{"image_id": 4, "caption": "Cats"}, {"image": "val/4.jpg", "caption": "Cat"}], "record 1: found image "
         "'val/4.jpg' a second time"),
        ([{"image_id": 4}], "record 0: found image_id; expected a text or number in one of caption, answer, text"),
        ([{"image_id": 4, "caption": None}], "record 0: found image_id, caption; expected"),
        ([4], "record 0: found 4; expected a text or number in one of image_id, image"),
    ],
)  # fmt: skip
def test_captions_that_do_not_fit_are_told_with_the_place(tmp_path: Path, records: list[Any], said: str) -> None:
    with pytest.raises(AnswerFileError, match=said):
        read_answers(write(tmp_path / "a.json", records), IMAGES)
