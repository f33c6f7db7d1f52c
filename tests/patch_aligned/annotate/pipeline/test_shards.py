"""Shards and the folder that holds them: whole or not at all, checked when read, of one run only."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from patch_aligned.annotate import folder as run_folder_module
from patch_aligned.annotate.folder import RunFolder, ShardError
from patch_aligned.annotate.manifest import ManifestEntry

ENTRIES = [ManifestEntry(f"{number}.jpg", "ein Bär\u2028") for number in range(5)]
SETTINGS: dict[str, Any] = {"sam": {"model": "a", "sizes": [1, 2]}, "versions": {"torch": "2"}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.start(tmp_path / "run", ENTRIES, SETTINGS, shard_size=2)


def write(folder: RunFolder, shard: int) -> Path:
    records = [
        {"image_id": entry.image_id, "caption": entry.caption, "status": "no_tags" if row else "ok"}
        for row, entry in enumerate(folder.entries_of(shard))
    ]
    folder.write_shard(shard, records)
    return folder.shard_path(shard)


def test_shards_hold_the_manifests_records_in_order(folder: RunFolder) -> None:
    assert folder.missing_shards() == [0, 1, 2]
    for shard in (2, 0, 1):
        write(folder, shard)
    assert folder.missing_shards() == []
    records = [record for shard in range(3) for record in folder.read_shard(shard)[1]]
    assert [record["image_id"] for record in records] == [entry.image_id for entry in ENTRIES]
    header, records = folder.read_shard(1)
    assert (header.shard, header.first, header.count, header.counts) == (1, 2, 2, {"no_tags": 1, "ok": 1})
    assert records[0]["caption"] == "ein Bär\u2028"
    assert header == folder.read_header(1)


def test_the_same_records_give_the_same_bytes(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(folder, 0).read_bytes()
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert write(folder, 0).read_bytes() == first


def test_what_a_killed_process_left_behind_is_cleared_and_what_another_writes_is_not(folder: RunFolder) -> None:
    path = folder.shard_path(0)
    path.parent.mkdir()
    old, young = (path.parent / f".{path.name}.{name}.tmp" for name in ("0123", "4567"))
    for temporary in (old, young):
        temporary.write_bytes(b"half a shard")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    assert folder.is_left(0)
    write(folder, 0)
    assert sorted(path.parent.iterdir()) == sorted([path, young])
    assert not folder.is_left(0)


def test_damaged_shards_are_not_done(folder: RunFolder) -> None:
    path = write(folder, 0)
    sound = path.read_bytes()
    lines = gzip.decompress(sound)
    damaged = {
        "cut off": sound[:-20],
        "no gzip": b"x" + sound,
        "empty": b"",
        "a changed record": gzip.compress(lines.replace(b"1.jpg", b"7.jpg")),
        "a lost record": gzip.compress(b"".join(lines.splitlines(keepends=True)[:-1])),
        "no header": gzip.compress(b"{}\n" + lines),
    }
    for what, content in damaged.items():
        path.write_bytes(content)
        assert folder.is_left(0), what
        with pytest.raises(ShardError, match="Remove it; `patch-aligned annotate` makes it again"):
            folder.read_shard(0)
    path.write_bytes(sound)
    assert not folder.is_left(0)


def test_shards_of_another_run_or_place_are_not_done(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder.start(tmp_path / "other", ENTRIES, {**SETTINGS, "sam": {"model": "b"}}, shard_size=2)
    folder.shard_path(0).parent.mkdir()
    folder.shard_path(0).write_bytes(write(other, 0).read_bytes())
    with pytest.raises(ShardError, match="field 'settings_sha256'"):
        folder.read_shard(0)
    folder.shard_path(0).write_bytes(write(folder, 1).read_bytes())
    with pytest.raises(ShardError, match="other images than those of the manifest's rows 0 to 1"):
        folder.read_shard(0)
    assert folder.is_left(0)


def test_numbers_that_are_not_finite_never_reach_a_shard(folder: RunFolder) -> None:
    records = [{"image_id": "a", "status": "ok", "tags": [{"score": float("nan")}]}]
    with pytest.raises(ValueError, match="JSON"):
        folder.write_shard(0, records)
    assert folder.missing_shards() == [0, 1, 2]


def test_a_folder_goes_on_only_with_its_own_settings(folder: RunFolder) -> None:
    again = RunFolder.start(folder.path, ENTRIES, SETTINGS, shard_size=2)
    assert again.settings_sha256 == folder.settings_sha256
    other = {"sam": {"model": "b", "sizes": [1, 2]}, "versions": {"torch": "2"}, "new": 1}
    with pytest.raises(ValueError) as refused:
        RunFolder.start(folder.path, ENTRIES, other, shard_size=3)
    assert [line.strip() for line in str(refused.value).splitlines()[1:-1]] == [
        "new: the folder has None, this call 1",
        "sam.model: the folder has 'a', this call 'b'",
        "shard_size: the folder has 2, this call 3",
    ]


def test_a_model_is_known_by_its_files_and_not_by_its_folder(tmp_path: Path) -> None:
    def start(folder: str, content: str) -> RunFolder:
        sam = {"model": folder, "revision": None, "files_sha256": {"model.safetensors": content}}
        return RunFolder.start(tmp_path, ENTRIES, {"sam": sam}, shard_size=2)

    begun = start("sam", "0")
    assert start("sam-moved", "0").settings_sha256 == begun.settings_sha256
    with pytest.raises(ValueError, match=r"sam\.files_sha256\.model\.safetensors: the folder has '0', this call '1'"):
        start("sam", "1")


def test_a_folder_goes_on_only_with_its_own_images(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"1 that the manifest lacks \(9.jpg\) and 1 of the manifest .* \(0.jpg\)"):
        RunFolder.start(folder.path, [*ENTRIES[1:], ManifestEntry("9.jpg")], SETTINGS, shard_size=2)
    with pytest.raises(ValueError, match="another order"):
        RunFolder.start(folder.path, ENTRIES[::-1], SETTINGS, shard_size=2)
    with pytest.raises(ValueError, match=r"other captions than the run began with: of 1 images \(4.jpg\)"):
        RunFolder.start(folder.path, [*ENTRIES[:4], ManifestEntry("4.jpg")], SETTINGS, shard_size=2)


def test_a_run_that_was_killed_before_its_settings_were_written_has_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_whole = run_folder_module.written_whole

    def killed_at_the_settings(path: Path) -> Any:
        if path.name == "settings.json":
            raise KeyboardInterrupt
        return written_whole(path)

    with monkeypatch.context() as until_then:
        until_then.setattr(run_folder_module, "written_whole", killed_at_the_settings)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.start(tmp_path, ENTRIES, SETTINGS, shard_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]
    folder = RunFolder.start(tmp_path, ENTRIES[:3], SETTINGS, shard_size=2)
    assert folder.entries == ENTRIES[:3]


def test_an_edited_manifest_is_found_out(folder: RunFolder) -> None:
    manifest = folder.path / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("4.jpg", "5.jpg"))
    with pytest.raises(ValueError, match=r"manifest.jsonl: found sha256 .* as in settings.json"):
        RunFolder(folder.path)


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"settings.json: found no such file"):
        RunFolder(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"shard_size": 2}))
    (tmp_path / "manifest.jsonl").touch()
    with pytest.raises(ValueError, match="found no settings of a run"):
        RunFolder(tmp_path)
