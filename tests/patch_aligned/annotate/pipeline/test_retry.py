"""Images that could not be had: a whole folder of them is an outage, single ones are recorded and tried again later."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from patch_aligned.annotate.folder import RunFolder
from playground.mini.replay import app

SHARD_SIZE = 4


@pytest.fixture
def run_replay(scenes: Path, tmp_path: Path) -> Callable[..., Any]:
    """The annotation pipeline over a copy of the scenes, `tmp_path/pictures`, into `tmp_path/run`."""
    shutil.copytree(scenes, tmp_path / "pictures")

    def run(*further: str) -> Any:
        return CliRunner().invoke(
            app,
            [
                "--images", str(scenes / "train.json"), "--image_folder", str(tmp_path / "pictures"),
                "--output", str(tmp_path / "run"), "--pad", str(scenes / "pad.json"),
                "--shard_size", str(SHARD_SIZE), *further,
            ],
        )  # fmt: skip

    return run


def image_ids(scenes: Path) -> list[str]:
    return [record["image"] for record in json.loads((scenes / "train.json").read_text())]


def statuses_of(folder: RunFolder) -> list[str]:
    """Of all records, read with hashes checked."""
    return [record["status"] for shard in range(folder.num_shards) for record in folder.read_shard(shard)[1]]


def lines(path: Path) -> list[bytes]:
    return gzip.decompress(path.read_bytes()).splitlines()


def test_a_shard_of_which_no_image_is_there_is_an_outage_not_a_result(
    run_replay: Callable[..., Any], scenes: Path, tmp_path: Path
) -> None:
    names = image_ids(scenes)
    for name in names[SHARD_SIZE : 2 * SHARD_SIZE]:
        (tmp_path / "pictures" / name).unlink()
    result = run_replay()
    assert result.exit_code == 2
    said = result.output.replace("\n", " ")
    assert (
        f"{tmp_path / 'pictures'}: none of the 4 images of a shard can be read, such as {names[SHARD_SIZE]!r}" in said
    )
    assert "Correct --image_folder, or mount the disk, and run the same command again" in said
    folder = RunFolder(tmp_path / "run")
    assert folder.missing_shards() == [1, 2, 3, 4]  # the first was done before

    shutil.copytree(scenes, tmp_path / "pictures", dirs_exist_ok=True)
    assert run_replay().exit_code == 0
    assert set(statuses_of(folder)) == {"ok"}


def test_images_that_are_lost_for_good_can_be_recorded_so(
    run_replay: Callable[..., Any], scenes: Path, tmp_path: Path
) -> None:
    for name in image_ids(scenes)[:SHARD_SIZE]:
        (tmp_path / "pictures" / name).unlink()
    assert run_replay("--allow_missing").exit_code == 0
    assert RunFolder(tmp_path / "run").read_shard(0)[0].counts == {"unreadable": SHARD_SIZE}


def test_records_of_a_status_are_made_anew_and_all_others_stay_as_they_are(
    run_replay: Callable[..., Any], scenes: Path, tmp_path: Path
) -> None:
    names = image_ids(scenes)
    hidden, gone = tmp_path / "pictures" / names[1], tmp_path / "pictures" / names[6]
    hidden.rename(tmp_path / "hidden")
    gone.unlink()
    said = run_replay().output.replace("\n", " ")
    assert "Images that failed: 2; their records say why" in said
    assert "--retry unreadable" in said
    folder = RunFolder(tmp_path / "run")
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in (folder.path / "shards").iterdir()}
    kept = [lines(folder.shard_path(shard))[1:] for shard in range(folder.num_shards)]

    (tmp_path / "hidden").rename(hidden)
    assert run_replay("--retry", "out_of_memory").exit_code == 0
    assert {path.name: (path.read_bytes(), path.stat().st_ino) for path in (folder.path / "shards").iterdir()} == before
    result = run_replay("--retry", "unreadable, non_finite")
    assert result.exit_code == 0
    assert "2 shards are left for this process" in result.output.replace("\n", " ")
    assert [row for row, status in enumerate(statuses_of(folder)) if status != "ok"] == [6]
    for shard in range(folder.num_shards):
        now = lines(folder.shard_path(shard))[1:]
        changed = [row for row, line in enumerate(now) if line != kept[shard][row]]
        assert changed == ([1] if shard == 0 else [])
    straight = json.loads(lines(folder.shard_path(0))[2])
    assert straight["labels"]


def test_a_status_that_no_record_has_is_refused(run_replay: Callable[..., Any], tmp_path: Path) -> None:
    result = run_replay("--retry", "unreadable,broken")
    assert result.exit_code == 2
    assert "--retry unreadable,broken: found 'broken', expected statuses" in result.output.replace("\n", " ")
    assert not (tmp_path / "run").exists()
