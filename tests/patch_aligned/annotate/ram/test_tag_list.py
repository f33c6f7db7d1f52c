"""Tag lists and thresholds are read line by line, and refused with the line and where they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from patch_aligned.annotate.ram.tagger import read_tag_list, read_thresholds


def test_the_last_line_may_end_without_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "tags.txt"
    path.write_bytes("3D CG rendering\r\nrubik's cube\r\ncafé".encode())
    assert read_tag_list(path) == ["3D CG rendering", "rubik's cube", "café"]
    path.write_text("0.65\n1\n 0.8", encoding="utf-8")
    assert read_thresholds(path) == [0.65, 1.0, 0.8]


@pytest.mark.golden
def test_the_first_lines_of_rams_list_are_read(ram_goldens: Path) -> None:
    tags = read_tag_list(ram_goldens / "tags_32.txt")
    assert (len(tags), tags[0], tags[-1]) == (32, "3D CG rendering", "air conditioning")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n\ndog", r"tags\.txt:2: found an empty line"),
        ("cat\ndog\ncat\n", r"tags\.txt:3: found 'cat' again, as in line 1"),
    ],
)
def test_empty_and_repeated_tags_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tags.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_tag_list(path)


@pytest.mark.parametrize("line", ["", "65%", "1.01", "-0.1", "nan"])
def test_thresholds_outside_of_0_to_1_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "thresholds.txt"
    path.write_text(f"0.5\n{line}\n0.5\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"thresholds\.txt:2: found '{line}', expected a number from 0 to 1"):
        read_thresholds(path)


def test_missing_files_say_where_they_come_from(tmp_path: Path) -> None:
    origin = r"absent: found no such file\. It is ram/data/{} of https://github\.com/xinyu1205.*{}"
    with pytest.raises(ValueError, match=origin.format(r"ram_tag_list\.txt", "--ram_tag_list")):
        read_tag_list(tmp_path / "absent")
    with pytest.raises(ValueError, match=origin.format(r"ram_tag_list_threshold\.txt", "--ram_thresholds")):
        read_thresholds(tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="binary: found no UTF-8 text"):
        read_tag_list(tmp_path / "binary")
