"""Files that appear whole or not at all, also where the machine goes down."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from pydantic import BaseModel

from patch_aligned.files import validated, written_whole
from patch_aligned.images import UnreadableImageError, decode_image
from patch_aligned.record_files import write_records


def test_a_file_is_on_the_disk_before_it_takes_its_name_and_then_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records.jsonl"
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().suffix, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_records([{"a": 1}], path)
    assert synced == [(".tmp", False), ("", True)]
    assert path.read_text() == '{"a": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_drive_that_syncs_no_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    with written_whole(tmp_path / "file") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"


def test_a_name_may_be_as_long_as_names_are(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        with written_whole(tmp_path / name) as temporary:
            temporary.touch()
        assert (tmp_path / name).is_file()


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_full_disk_cannot_take_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(OSError, match=r"a\.txt: cannot be written \(No space left"), written_whole(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


def test_pipes_and_devices_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path("/dev/zero")):
        with pytest.raises(UnreadableImageError, match="pipe or device"):
            decode_image(path)


class Point(BaseModel):
    x: float
    tags: list[str] = []


def test_what_a_file_holds_is_read_strictly_and_a_wrong_field_is_named() -> None:
    expected = [Point(x=1.5, tags=["a"])]
    assert validated(list[Point], b'[{"x": 1.5, "tags": ["a"], "y": 0}]', "f") == expected
    assert validated(list[Point], [{"x": 1.5, "tags": ["a"]}], "f") == expected
    for content in (b'[{"x": "1.5"}]', [{"x": "1.5"}]):
        with pytest.raises(ValueError, match=r"^f\.json: field '\[0\]\.x': found '1\.5'; "):
            validated(list[Point], content, "f.json")
    with pytest.raises(ValueError, match=r"^record 3: field 'x': found nothing"):
        validated(Point, {}, "record 3")
