"""What a run says while it works: of each image, not of each shard alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from patch_aligned.annotate import run as progress_module
from patch_aligned.annotate.folder import RunFolder, ShardHeader
from patch_aligned.annotate.manifest import ManifestEntry, list_images
from patch_aligned.annotate.options import Workload
from patch_aligned.annotate.pipeline import StageClock, Stages, StageTime, annotate_images
from patch_aligned.annotate.run import ProgressReport, Rank

Tick = Callable[[float], None]


def test_each_image_is_told_of_once_whatever_becomes_of_it(build: Callable[[str], Stages], scenes: Path) -> None:
    entries, folder = list_images(scenes / "train.json", scenes)
    entries.append(ManifestEntry("gone.jpg"))
    told = count()
    records = annotate_images(entries, build("cpu"), folder, Workload(), StageClock(lambda: next(told)))
    assert {record["status"] for record in records} == {"ok", "no_tags", "no_boxes", "unreadable"}
    assert next(told) == len(entries)


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Tick:
    """Lets the clock move on by some seconds; else it stands."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


@pytest.fixture
def said(tmp_path: Path, tick: Tick) -> Iterator[tuple[ProgressReport, io.StringIO]]:
    """A report to a log, of ten images in two shards, and what it said."""
    folder = RunFolder.start(tmp_path, [ManifestEntry(f"{number}.jpg") for number in range(10)], {}, shard_size=5)
    log = io.StringIO()
    report = ProgressReport(Console(file=log), Rank(0, 1, "cpu"))
    with report.progress:
        report.opened(folder, [0, 1])
        log.seek(0)
        log.truncate()
        yield report, log


def test_a_log_has_a_line_a_minute_within_a_shard(said: tuple[ProgressReport, io.StringIO], tick: Tick) -> None:
    report, log = said
    for _ in range(4):
        tick(20)
        report.image_done()
    assert log.getvalue() == "rank 0: 3 of 10 images; 0.1 images/s, 0:02:20 left\n"


def test_a_shards_line_counts_images_that_were_tried_twice_once(
    said: tuple[ProgressReport, io.StringIO], tick: Tick
) -> None:
    report, log = said
    for _ in range(7):
        report.image_done()
    tick(10)
    report.finished(ShardHeader(0, 0, 5, "", {"ok": 4, "no_tags": 1}, ""), {"tag": StageTime(5, 2.0)})
    assert log.getvalue() == "shard 00000 (1/2): 4 ok, 1 no_tags; tag 2.5/s; 0.5 images/s, 0:00:10 left\n"
