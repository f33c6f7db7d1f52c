"""Captions are kept as they come, and those of another source are joined by the image."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from eval.captions.references import CaptionedImage
from eval.captions.run import CaptionLog
from eval.captions.score import read_answers

IMAGES = (CaptionedImage("9", "val/9.jpg", ("A dog.",)), CaptionedImage("4", "val/4.jpg", ("Cats.",)))


def write(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Three images."""
    made = {name: tmp_path / f"{name}.png" for name in "abc"}
    for name, path in made.items():
        path.write_text(f"picture {name}")
    return made


def test_all_processes_captions_of_one_identity_are_read(tmp_path: Path, files: dict[str, Path]) -> None:
    folder = tmp_path / "log"
    CaptionLog(folder, "one", files, 0).keep("a", "A “dog”\n on two lines\u2028")
    CaptionLog(folder, "one", files, 1).keep("b", "")
    CaptionLog(folder, "other", files).keep("c", "A car")
    assert CaptionLog(folder, "one", files).known == {"a": "A “dog”\n on two lines\u2028", "b": ""}


def test_an_image_that_is_another_by_now_has_no_caption_yet(tmp_path: Path, files: dict[str, Path]) -> None:
    for image in "abc":
        CaptionLog(tmp_path, "one", files).keep(image, "A dog")
    files["a"].write_text("picture z")
    os.utime(files["b"], (1, 1))  # copied, say
    del files["c"]  # not asked for
    log = CaptionLog(tmp_path, "one", files)
    assert log.known == {"b": "A dog"}
    log.keep("a", "A cat")
    assert CaptionLog(tmp_path, "one", files).known == {"a": "A cat", "b": "A dog"}


@pytest.mark.parametrize("line", ["[", "7", '["a", "A dog"]'])
def test_a_line_that_is_no_caption_is_told(tmp_path: Path, files: dict[str, Path], line: str) -> None:
    CaptionLog(tmp_path, "one", files).keep("a", "A dog")
    path = tmp_path / "one-0.jsonl"
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ValueError, match=r"one-0\.jsonl, line 2: found no .*; next: delete the file"):
        CaptionLog(tmp_path, "one", files)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_line_that_was_cut_off_is_lost_and_spoils_no_other(tmp_path: Path, files: dict[str, Path], rank: int) -> None:
    log = CaptionLog(tmp_path, "one", files)
    log.keep("a", "A dog")
    log.keep("b", "Two cats")
    path = tmp_path / "one-0.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    again = CaptionLog(tmp_path, "one", files, rank)
    assert again.known == {"a": "A dog"}
    again.keep("b", "Two cats")
    assert CaptionLog(tmp_path, "one", files).known == {"a": "A dog", "b": "Two cats"}


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
        ([{"image_id": 4}], "record 0: field 'caption': found nothing"),
        ([{"image_id": 4, "caption": None}], "record 0: field 'caption': found None"),
        ([4], "record 0: found 4"),
    ],
)  # fmt: skip
def test_captions_that_do_not_fit_are_told_with_the_place(tmp_path: Path, records: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_answers(write(tmp_path / "a.json", records), IMAGES)
