"""Which images are annotated: of a folder, of a list, of LLaVA's JSON."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from patch_aligned.annotate.folder import RunFolder
from patch_aligned.annotate.manifest import ManifestEntry, list_images


def test_a_folder_is_listed_by_path_and_what_is_no_image_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b/2.png", "b/10.JPG", "c.JPE", "d.pgm", "e.jp2", "f.heic", "g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "h.png")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    entries, folder = list_images(tmp_path)
    names = ["b/10.JPG", "b/2.png", "c.JPE", "d.pgm", "e.jp2", "linked/10.JPG", "linked/2.png"]
    assert entries == [ManifestEntry(name) for name in names]
    assert folder == tmp_path
    assert "3 files" in caplog.text and "1 .heic" in caplog.text


def test_llavas_json_gives_images_in_its_order_with_the_answer_as_caption(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": "a wall \n"}]
    records = [
        {"id": "1", "image": "b.jpg", "conversations": turns},
        {"id": "2", "conversations": turns},
        {"id": "3", "image": ["a.jpg", "b.jpg"], "conversations": [{"from": "gpt", "value": "two"}]},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    entries, _ = list_images(tmp_path / "llava.json", tmp_path)
    assert entries == [ManifestEntry("b.jpg", "a wall"), ManifestEntry("a.jpg", "two")]


def test_lists_of_paths_and_of_records(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("x/b.jpg\n\n./a.jpg\nx//b.jpg\n")
    assert list_images(tmp_path / "list.txt", tmp_path)[0] == [ManifestEntry("x/b.jpg"), ManifestEntry("a.jpg")]
    (tmp_path / "list.jsonl").write_text(
        '{"image_id": "a.jpg", "caption": "one"}\n{"image": "b.jpg", "blip_caption": "two"}\n'
    )
    entries, _ = list_images(tmp_path / "list.jsonl", tmp_path)
    assert entries == [ManifestEntry("a.jpg", "one"), ManifestEntry("b.jpg", "two")]


def test_a_list_may_hold_paths_with_odd_characters_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("\ufeffa.jpg\r\nb\u2028c.jpg\n".encode())
    assert list_images(tmp_path / "list.txt", tmp_path)[0] == [ManifestEntry("a.jpg"), ManifestEntry("b\u2028c.jpg")]
    (tmp_path / "list.txt").write_bytes(b"\xff.jpg\n")
    with pytest.raises(ValueError, match=r"list.txt: found text that is not UTF-8"):
        list_images(tmp_path / "list.txt", tmp_path)


def test_a_caption_that_no_file_can_hold_is_refused_by_its_record(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": "half an emoji: \ud83d"}) + "\n")
    with pytest.raises(ValueError, match=r"list.jsonl: record 0: found caption 'half an emoji: \\ud83d'"):
        list_images(tmp_path / "list.jsonl", tmp_path)


def test_a_folder_that_cannot_be_read_is_refused_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jpg").touch()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"closed: found a folder or link that cannot be read \(Permission denied\)"):
        list_images(tmp_path)


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images" / "part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"part/back.*: found a link that leads back to"):
        list_images(tmp_path / "images")
    for name, other in (("a", "b"), ("b", "a")):  # to each other
        (tmp_path / "links" / name).mkdir(parents=True)
        (tmp_path / "links" / name / "next").symlink_to(tmp_path / "links" / other)
    with pytest.raises(ValueError, match="a link that leads back to"):
        list_images(tmp_path / "links")


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "a\ud800.jpg", "."])
def test_paths_that_leave_the_image_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "ok.jpg"}) + "\n" + json.dumps({"image": name}) + "\n")
    with pytest.raises(ValueError, match=r"list.jsonl: record 1: found image .* below the image folder"):
        list_images(tmp_path / "list.jsonl", tmp_path)


def test_what_names_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no images"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match=r"found no folder; expected one, or a list ending in \.txt"):
        list_images(tmp_path / "missing")
    (tmp_path / "list.txt").write_text("a.jpg")
    with pytest.raises(ValueError, match="--image_folder: found none, expected the folder"):
        list_images(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="found another folder than --images"):
        list_images(tmp_path, tmp_path.parent)
    (tmp_path / "list.jsonl").write_text('{"image": 3}\n')
    with pytest.raises(ValueError, match=r"record 0, field 'image': found 3, expected a path"):
        list_images(tmp_path / "list.jsonl", tmp_path)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    entries = [ManifestEntry("ä/1.jpg", "a “caption”\u2028of two lines"), ManifestEntry("2.jpg")]
    RunFolder.start(tmp_path, entries, {}, shard_size=2)
    assert RunFolder(tmp_path).entries == entries
