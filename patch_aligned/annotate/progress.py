"""What a run shows while it works: a bar with images a second by stage in a terminal, lines elsewhere, and a log."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from patch_aligned.annotate.engines import Place
from patch_aligned.annotate.process_shard import FAILED_STATUSES
from patch_aligned.annotate.run_folder import RunFolder
from patch_aligned.annotate.shards import ShardHeader, read_header
from patch_aligned.annotate.stage_clock import STAGES, StageTime, StageTimes

_SECONDS_BETWEEN_LINES = 60.0  # in a log of all processes together, beside the line that each shard gets


class ProgressReport:
    """Looks on at one process's shards; to be used in a `with` block."""

    def __init__(self, console: Console, place: Place) -> None:
        self._console = console
        self._rank = place.rank
        self._seconds_between_lines = _SECONDS_BETWEEN_LINES * place.world_size
        self._times: StageTimes = dict.fromkeys(STAGES, StageTime())
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rates]}"),
            console=console,
            disable=not console.is_terminal or place.rank > 0,
        )

    def __enter__(self) -> ProgressReport:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def opened(self, folder: RunFolder, todo: Sequence[int]) -> None:
        """Says what is left to do."""
        self._folder = folder
        self._todo = len(todo)
        self._done = 0
        self._begin = time.perf_counter()
        self._images = sum(len(folder.entries_of(shard)) for shard in todo)
        self._images_done = 0
        self._images_in_shards = 0
        self._last_line = self._begin
        self._task = self._progress.add_task("Annotating", total=self._images, rates="")
        self._console.print(
            f"{folder.path}: {len(folder.entries):,} images in {folder.num_shards} shards; "
            f"{len(todo)} shards are left for this process (rank {self._rank})",
            soft_wrap=True,
        )

    def image_done(self) -> None:
        """Moves on by one image; in a log, says so now and then."""
        self._images_done += 1
        self._progress.update(self._task, completed=self._images_done)
        if self._progress.disable and time.perf_counter() - self._last_line >= self._seconds_between_lines:
            self._print(f"rank {self._rank}: {self._images_done:,} of {self._images:,} images")

    def finished(self, header: ShardHeader, times: StageTimes) -> None:
        """Moves on by one shard."""
        for stage, taken in times.items():
            self._times[stage] += taken
        self._done += 1
        self._images_in_shards += header.count
        self._images_done = self._images_in_shards  # those that were tried twice count once
        self._log(header, times)
        self._progress.update(self._task, completed=self._images_done, rates=_rates(self._times))
        if self._progress.disable:
            self._print(
                f"shard {header.shard:05d} ({self._done}/{self._todo}): {_counted(header.counts)}; {_rates(times)}"
            )

    def _print(self, what: str) -> None:
        self._last_line = time.perf_counter()
        elapsed = self._last_line - self._begin
        left = elapsed / self._images_done * (self._images - self._images_done)
        self._console.print(
            f"{what}; {self._images_done / elapsed:.1f} images/s, {_clock(max(left, 0.0))} left", soft_wrap=True
        )

    def _log(self, header: ShardHeader, times: StageTimes) -> None:
        path = self._folder.path / "logs" / f"rank-{self._rank:05d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        seconds = {stage: round(taken.seconds, 3) for stage, taken in times.items()}
        line = {"time": time.time(), "shard": header.shard, "counts": header.counts, "seconds": seconds}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def show_summary(console: Console, folder: RunFolder) -> None:
    """Images by status in all shards of the folder, whoever made them, and what is missing."""
    counts: Counter[str] = Counter()
    missing = set(folder.missing_shards())
    for shard in range(folder.num_shards):
        if shard not in missing:
            counts.update(read_header(folder.shard_path(shard)).counts)
    table = Table("status", "images")
    for status, count in sorted(counts.items()):
        table.add_row(status, f"{count:,}")
    console.print(table)
    if failed := [status for status in FAILED_STATUSES if counts[status]]:
        console.print(
            f"Images that failed: {sum(counts[status] for status in failed):,}; their records say why. Once that is "
            f"mended, try them again: the same command with --retry {','.join(failed)}",
            soft_wrap=True,
        )
    if missing:
        console.print(f"{len(missing)} of {folder.num_shards} shards are not there yet; other processes make them")
    else:
        console.print(
            f"All {folder.num_shards} shards are there. Next: patch-aligned merge {folder.path} --output pad.jsonl.gz",
            soft_wrap=True,
        )


def _rates(times: StageTimes) -> str:
    return ", ".join(
        f"{stage} {taken.images / taken.seconds:.1f}/s" for stage, taken in times.items() if taken.seconds > 0
    )


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
