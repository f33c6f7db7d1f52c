"""Verification: each kind of fault is found, named with its place, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from patch_aligned.cli import app
from patch_aligned.dataset.verify import Problem, Verification, VerifySettings, verify_file
from patch_aligned.images import ImageFileError, stored_size_wh
from patch_aligned.masks import areas_px
from patch_aligned.pad import read_annotations
from tests.patch_aligned.dataset.conftest import label, record

Make = Callable[..., Any]


def problems_of(pad: Path, **settings: Any) -> tuple[Verification, list[Problem]]:
    problems: list[Problem] = []
    return verify_file(pad, VerifySettings(**settings), problems.append), problems


def test_a_sound_file_has_no_problem_and_is_counted(write_pad: Make, tmp_path: Path):
    pad = write_pad(record("a.png", label(0, 0, 10, 10), label(20, 20, 96, 64)), record("b/c.png"))
    found, problems = problems_of(pad, image_folder=tmp_path / "images")
    assert problems == []
    assert (found.records, found.images, found.images_without_regions, found.regions) == (2, 2, 1, 2)


@pytest.mark.parametrize(
    ("severity", "check", "changed"),
    [
        ("error", "box outside image", {"bbox": [-6, 10, 40, 30]}),
        ("error", "box outside image", {"bbox": [10, 10, 40, 68]}),
        ("error", "box without area", {"bbox": [10, 10, 10, 30]}),
        ("error", "mask against box", {"bbox": [60, 40, 90, 60]}),
        ("warning", "mask against box", {"bbox": [10, 10, 40, 60]}),
        ("error", "score", {"score": float("nan")}),
        ("error", "score", {"score": "high"}),
        ("error", "score", {"score": 10**400}),  # JSON has it, no float does
        ("error", "format of labels[].rle_mask", {"rle_mask": "5"}),
        ("error", "format of labels[].tag", {"tag": " "}),
    ],
)
def test_a_broken_region_is_named(write_pad: Make, severity: str, check: str, changed: dict[str, Any]):
    sound = label(0, 0, 10, 10)
    pad = write_pad(record("a.png", sound), record("b.png", sound, label(10, 10, 40, 30) | changed))
    found, problems = problems_of(pad)
    named = [problem for problem in problems if problem.check == check]
    assert [(p.severity, p.record, p.image_id) for p in named] == [(severity, 1, "b.png")]
    assert named[0].field == f"labels[1].{next(iter(changed))}" or check == "mask against box"
    assert named[0].found and named[0].expected
    assert found.counts[severity][check] == 1


def test_a_box_may_leave_the_image_by_the_tolerance(write_pad: Make):
    pad = write_pad(record("a.png", label(0, 0, 40, 30, bbox=[-4.8, -3.2, 40, 30])))
    assert problems_of(pad)[1] == []
    assert [problem.check for problem in problems_of(pad, box_tolerance=0.04)[1]] == ["box outside image"]


def test_an_empty_mask_and_a_region_given_twice_are_found(write_pad: Make):
    pad = write_pad(record("a.png", label(5, 5, 5, 5, bbox=[5, 5, 9, 9]), label(0, 0, 9, 9), label(0, 0, 9, 9)))
    checks = [(problem.severity, problem.check, problem.field) for problem in problems_of(pad)[1]]
    assert checks == [("error", "empty mask", "labels[0].rle_mask"), ("warning", "region twice", "labels[2]")]


@pytest.mark.parametrize("count", [255, 256, 300])
def test_regions_of_an_image_may_be_many(write_pad: Make, count: int):
    pad = write_pad(record("a.png", *(label(8, 5, 30, 25, tag=f"t{number}") for number in range(count))))
    assert problems_of(pad)[1] == []
    [image] = read_annotations(pad)
    assert areas_px(image.coco_masks()).tolist() == [22 * 20] * count


def test_records_behind_broken_ones_keep_their_place(write_pad: Make):
    outside = label(0, 0, 40, 30, bbox=[0, 0, 400, 30])
    broken = record("x.png", size=[0, 5])
    pad = write_pad(broken, record("a.png"), broken, broken, record("b.png", outside), record("a.png"))
    found, problems = problems_of(pad)
    assert [problem.record for problem in problems if problem.check == "format of size"] == [0, 2, 3]
    assert {problem.record for problem in problems if problem.image_id == "b.png"} == {4}
    assert [(p.record, p.found) for p in problems if p.check == "format of image_id"] == [
        (5, "the id of record 1 again")
    ]
    assert (found.records, found.images) == (6, 2)


def test_images_are_compared_with_their_files(write_pad: Make, tmp_path: Path):
    pad = write_pad(*(record(name) for name in ("same.png", "swapped.png", "gone.png", "broken.png", "turned.png")))
    images = tmp_path / "images"
    Image.new("RGB", (64, 96)).save(images / "swapped.png")
    (images / "gone.png").unlink()
    (images / "broken.png").write_bytes(b"no image")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn: the record is of the image as it is stored
    Image.new("RGB", (96, 64)).save(images / "turned.png", exif=exif)
    problems = problems_of(pad, image_folder=images)[1]
    checks = [(problem.check, problem.image_id) for problem in problems]
    assert checks == [
        ("image size", "swapped.png"),
        ("image file", "gone.png"),
        ("image file", "broken.png"),
        ("image size", "turned.png"),
    ]
    assert "[64, 96]" in problems[3].expected and "EXIF" in problems[3].expected
    assert "[64, 96]" in problems[0].expected and "swapped" in problems[0].expected
    assert problems_of(pad)[1] == []


@pytest.mark.parametrize("image_id", ["../pad.json", "a/../../b.png", "/a.png"])
def test_no_id_leads_out_of_the_image_folder(tmp_path: Path, image_id: str):
    with pytest.raises(ImageFileError, match="leads out of"):
        stored_size_wh(tmp_path / "images", image_id)


def test_a_file_that_is_cut_off_is_a_problem_behind_what_was_read(write_pad: Make):
    pad = write_pad(*(record(f"{number}.png") for number in range(65)))  # records are read by 64
    pad.write_text(pad.read_text()[:-30])
    found, problems = problems_of(pad)
    assert (found.images, [problem.check for problem in problems]) == (64, ["file"])
    assert "record 64" in problems[0].found and "cut off" in problems[0].found


def test_a_file_without_records_is_not_called_right(write_pad: Make):
    found, problems = problems_of(write_pad())
    assert found.errors == 1 and found.records == 0
    assert [(p.severity, p.check, p.found, p.expected) for p in problems] == [
        ("error", "file", "no record", "at least one image")
    ]


def test_the_command_reports_and_ends_with_1_on_errors_alone(write_pad: Make, tmp_path: Path):
    odd = label(10, 10, 40, 30, bbox=[10, 10, 40, 60])
    pad = write_pad(record("a.png", odd))
    result = CliRunner().invoke(app, ["verify", str(pad)])
    assert result.exit_code == 0, result.output
    assert "Errors: 0, warnings: 1" in result.output.replace("\n", " ")

    pad = write_pad(record("a.png", odd), record("b|c.png", label(0, 0, 9, 9, tag="")))
    result = CliRunner().invoke(app, ["verify", str(pad), "--output", str(tmp_path / "report")])
    assert result.exit_code == 1, result.output
    report = json.loads((tmp_path / "report" / "verify.json").read_text())
    assert report["counts"] == {"error": {"format of labels[].tag": 1}, "warning": {"mask against box": 1}}
    lines = [json.loads(line) for line in (tmp_path / "report" / "problems.jsonl").read_text().splitlines()]
    assert [line["severity"] for line in lines] == ["warning", "error"]
    assert set(lines[1]) == {"severity", "check", "record", "image_id", "field", "found", "expected"}
    assert "b\\|c.png" in (tmp_path / "report" / "verify.md").read_text()


def test_errors_of_single_regions_need_not_fail_the_command(write_pad: Make, tmp_path: Path):
    off = label(0, 0, 40, 30, bbox=[60, 40, 90, 60])
    pad = write_pad(record("a.png", off, label(5, 5, 5, 5, bbox=[5, 5, 9, 9], score="high")))
    lenient = ["verify", str(pad), "--fail_on", "broken_file"]
    assert CliRunner().invoke(app, lenient[:2]).exit_code == 1
    result = CliRunner().invoke(app, lenient)
    assert result.exit_code == 0, result.output
    assert "Errors: 3" in result.output.replace("\n", " ")
    (tmp_path / "images" / "a.png").unlink()
    assert CliRunner().invoke(app, [*lenient, "--image-folder", str(tmp_path / "images")]).exit_code == 1
    write_pad(record("a.png", label(0, 0, 9, 9, tag="")))
    assert CliRunner().invoke(app, lenient).exit_code == 1


def test_a_missing_file_or_folder_ends_with_a_sentence_and_2(write_pad: Make, tmp_path: Path):
    for words in ([str(tmp_path / "none.json")], [str(write_pad(record("a.png"))), "--image-folder", "nowhere"]):
        result = CliRunner().invoke(app, ["verify", *words])
        assert result.exit_code == 2
        assert "no such" in result.output
    assert not (tmp_path / "none.json.verify").exists()
