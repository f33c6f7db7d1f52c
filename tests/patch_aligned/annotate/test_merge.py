"""Merging: all images of the manifest are accounted for, in its order, or what is missing is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from patch_aligned.annotate.folder import RunFolder, merge
from patch_aligned.annotate.manifest import ManifestEntry
from patch_aligned.cli import app
from patch_aligned.pad import read_annotations
from patch_aligned.record_files import RecordFileError
from tests.pads import rle_of

STATUSES = ["ok", "no_boxes", "ok", "unreadable", "ok"]


def record_of(name: str, status: str) -> dict[str, Any]:
    mask = rle_of(np.eye(8))
    labels = [{"tag": "line", "bbox": [0.0, 0.0, 8.0, 8.0], "rle_mask": mask, "score": 0.5}] if status == "ok" else []
    return {
        "image_id": name,
        "size": None if status == "unreadable" else [8, 8],
        "caption": f"caption of {name}",
        "labels": labels,
        "status": status,
        "reason": None if status == "ok" else f"{name} has a reason",
        "tags": [{"name": "line", "score": 0.9}],
        "candidates": [{"bbox": [0, 0, 1, 1], "score": 0.1}],
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Five images in three shards, not in the order of their names."""
    names = ["e.jpg", "a.jpg", "d.jpg", "b.jpg", "c.jpg"]
    folder = RunFolder.start(tmp_path / "out", [ManifestEntry(name) for name in names], {"seed": 1}, shard_size=2)
    for shard in range(3):
        rows = slice(2 * shard, 2 * shard + 2)
        records = [record_of(name, status) for name, status in zip(names[rows], STATUSES[rows], strict=True)]
        folder.write_shard(shard, records)
    return folder


def test_a_run_is_not_overwritten_by_its_merged_file(run: RunFolder):
    before = {path: path.read_bytes() for path in run.files()}
    for path in before:
        with pytest.raises(ValueError, match=path.name):
            merge(run, path.parent / ".." / path.parent.name / path.name)
    assert before == {path: path.read_bytes() for path in run.files()}


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".parquet"])
def test_ok_images_are_merged_and_the_others_listed(run: RunFolder, tmp_path: Path, suffix: str):
    output = tmp_path / "new" / f"pad{suffix}"
    merged = merge(run, output)
    records = [image.to_record() for image in read_annotations(output)]
    assert [record["image_id"] for record in records] == ["e.jpg", "d.jpg", "c.jpg"]
    expected = record_of("d.jpg", "ok")
    del expected["candidates"]
    assert records[1] == expected
    skipped = [json.loads(line) for line in merged.skipped.read_text().splitlines()]
    assert skipped == [
        {"image_id": "a.jpg", "status": "no_boxes", "reason": "a.jpg has a reason"},
        {"image_id": "b.jpg", "status": "unreadable", "reason": "b.jpg has a reason"},
    ]
    assert (merged.images, merged.written, merged.regions) == (5, 3, 3)
    assert merged.counts == {"no_boxes": 1, "ok": 3, "unreadable": 1}
    settings = json.loads(output.with_name(f"{output.name}.settings.json").read_text())
    assert settings == run.settings
    assert len(list(output.parent.iterdir())) == 3


def test_all_takes_every_image_that_has_a_size(run: RunFolder, tmp_path: Path):
    merged = merge(run, tmp_path / "pad.json", keep_all=True, keep_candidates=True)
    images = list(read_annotations(tmp_path / "pad.json"))
    assert [image.image_id for image in images] == ["e.jpg", "a.jpg", "d.jpg", "c.jpg"]
    assert images[0].extra["candidates"] == [{"bbox": [0, 0, 1, 1], "score": 0.1}]
    assert [json.loads(line)["image_id"] for line in merged.skipped.read_text().splitlines()] == ["b.jpg"]


def test_missing_shards_are_named_with_their_images_and_nothing_is_written(run: RunFolder, tmp_path: Path):
    run.shard_path(0).unlink()
    run.shard_path(2).unlink()
    output = tmp_path / "pad" / "pad.json"
    result = CliRunner().invoke(app, ["merge", str(run.path), "--output", str(output)])
    assert result.exit_code == 2
    message = " ".join(result.output.split())
    assert "2 of 3 shards are not there, 3 of 5 images" in message
    assert "2 images, 'e.jpg' to 'a.jpg'" in message and "1 images, 'c.jpg' to 'c.jpg'" in message
    assert "`patch-aligned annotate`" in message
    assert not output.parent.exists()


def test_all_damaged_shards_are_named_and_the_old_file_stays(run: RunFolder, tmp_path: Path):
    output = tmp_path / "pad.json"
    output.write_text("[]\n")
    for shard in (0, 2):
        path = run.shard_path(shard)
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"line", b"lime")))
    with pytest.raises(ValueError, match="2 of 3 shards are damaged, 3 of 5 images") as caught:
        merge(run, output)
    assert str(run.shard_path(0)) in str(caught.value) and "sha256" in str(caught.value)
    assert output.read_text() == "[]\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pad.json"]


def test_an_unknown_kind_of_file_is_refused_before_the_work(run: RunFolder, tmp_path: Path):
    with pytest.raises(RecordFileError, match="suffix"):
        merge(run, tmp_path / "pad.csv")
    assert not list(tmp_path.glob("pad*"))


def test_the_command_counts_by_status(run: RunFolder, tmp_path: Path):
    output = tmp_path / "pad.json"
    result = CliRunner().invoke(app, ["merge", str(run.path), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "status no_boxes" in result.output
    assert f"{output}: 3 records, 3 regions" in result.output.replace("\n", "")
