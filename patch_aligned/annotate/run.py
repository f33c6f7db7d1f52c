"""Who works on which shard: one process, several that share the shards by their rank, or Ray's actors.

All of them call `process_shard`, and all write the same files: which images share a batch depends on the manifest and
the batch sizes alone, so a shard's bytes do not depend on who makes it, when, or how often it was interrupted.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from patch_aligned.annotate.folder import Record, RunFolder, ShardHeader
from patch_aligned.annotate.manifest import ManifestEntry
from patch_aligned.annotate.options import Engine, Workload
from patch_aligned.annotate.pipeline import StageClock, Stages, StageTimes, annotate_images
from patch_aligned.images import NO_SUCH_FILE, NOT_PERMITTED

FAILED_STATUSES = ("unreadable", "out_of_memory", "non_finite", "unparsable")
"""Statuses of images for which something failed. The others say that there was nothing to annotate."""

STATUSES = ("ok", "no_tags", "no_boxes", "no_masks", "skipped", *FAILED_STATUSES)
"""All that a record may have."""


def statuses_named(text: str | None) -> frozenset[str]:
    """Return the statuses of `--retry`, names separated by commas; `ValueError` if one is no status."""
    names = frozenset(name.strip() for name in text.split(",")) if text is not None else frozenset()
    if unknown := names - set(STATUSES):
        raise ValueError(
            f"--retry {text}: found {', '.join(map(repr, sorted(unknown)))}, expected statuses separated by commas: "
            f"{', '.join(STATUSES)}"
        )
    return names


def process_shard(
    folder: RunFolder,
    shard: int,
    stages: Stages,
    image_folder: Path,
    workload: Workload,
    clock: StageClock | None = None,
    retry: Collection[str] = (),
) -> ShardHeader:
    """Annotate the images of a shard and write its file; of a shard that is there only those of the statuses `retry`.

    Nothing is written where images failed and `on_error` is `fail` (`ValueError`), or are not available (`OSError`).
    """
    entries = folder.entries_of(shard)
    rows = list(range(len(entries)))
    records: list[Record] = [{} for _ in entries]
    if retry and (finished := folder.finished_records(shard)):
        records = finished
        rows = [row for row in rows if records[row]["status"] in retry]
    annotated = _annotated([entries[row] for row in rows], stages, image_folder, workload, clock or StageClock())
    for row, record in zip(rows, annotated, strict=True):
        records[row] = record
    if not workload.allow_missing:
        _refuse_all_missing(records, image_folder)
    if workload.on_error == "fail":
        _refuse_failed(records)
    return folder.write_shard(shard, records)


def _annotated(
    entries: list[ManifestEntry], stages: Stages, image_folder: Path, workload: Workload, clock: StageClock
) -> list[Record]:
    """Return one record for each image, in order. Chunks of them are in memory, one on the device, others decoded."""
    chunks = [entries[start : start + workload.chunk] for start in range(0, len(entries), workload.chunk)]
    with (
        ThreadPoolExecutor(workload.decode_workers) as decoders,
        ThreadPoolExecutor(workload.chunks_at_once) as runners,
    ):

        def annotate(chunk: list[ManifestEntry]) -> list[Record]:
            return annotate_images(chunk, stages, image_folder, workload, clock, decoders)

        try:
            records = [record for done in runners.map(annotate, chunks) for record in done]
        except BaseException:
            runners.shutdown(wait=False, cancel_futures=True)  # or the other chunks would still be processed
            raise
    if workload.chunks_at_once > 1:
        # Another chunk may have held the memory. Now each image has the device for itself.
        for row, record in enumerate(records):
            if record["status"] == "out_of_memory":
                records[row] = annotate_images([entries[row]], stages, image_folder, workload, clock)[0]
    return records


def _refuse_all_missing(records: Sequence[Record], image_folder: Path) -> None:
    """A single missing image is that image's fault; a whole shard of them is the folder's."""
    if all(record["reason"] in (NO_SUCH_FILE, NOT_PERMITTED) for record in records):
        raise OSError(
            f"{image_folder}: none of the {len(records):,} images of a shard can be read, such as "
            f"{records[0]['image_id']!r} ({records[0]['reason']}). Nothing was recorded of them. Correct "
            "--image_folder, or mount the disk, and run the same command again, with --retry unreadable if earlier "
            "shards lack images too. If these are lost for good, add --allow_missing"
        )


def _refuse_failed(records: Sequence[Record]) -> None:
    failed = [record for record in records if record["status"] in FAILED_STATUSES]
    if failed:
        listed = "; ".join(f"{record['image_id']}: {record['status']} ({record['reason']})" for record in failed[:5])
        raise ValueError(
            f"{len(failed)} images failed, and their shard was not written: {listed}{'; ...' if failed[5:] else ''}. "
            "Fix them, or pass --on_error skip to record them"
        )


_DECIDING_PACKAGES = ("patch-aligned-llava", "torch", "transformers", "pillow", "numpy", "pycocotools")


@dataclass(frozen=True)
class AnnotationJob:
    """One annotation run as plain values, which can be sent to another process."""

    entries: list[ManifestEntry]  # in the manifest's order
    image_folder: Path  # that their ids start from
    output: Path
    build: Callable[[str], Stages]  # on a device
    workload: Workload
    shard_size: int = 2000  # images
    retry: frozenset[str] = frozenset()  # statuses of the records that are made again in existing shards


class ShardWorker:
    """The models on one device, which process one shard at a time.

    The constructor loads nothing: to Ray's user its error would be a dead actor, one of a method is itself.
    """

    def __init__(self, job: AnnotationJob, device: str) -> None:
        self._job, self._device = job, device

    @cached_property
    def stages(self) -> Stages:
        """The models."""
        return self._job.build(self._device)

    @cached_property
    def folder(self) -> RunFolder:
        """The run's folder, made or opened; `ValueError` if it was begun with other settings."""
        job = self._job
        settings = {
            **self.stages.settings,
            "min_side": job.workload.min_side,
            "max_aspect": job.workload.max_aspect,
            "versions": {package: version(package) for package in _DECIDING_PACKAGES},
        }
        return RunFolder.start(job.output, job.entries, settings, job.shard_size)

    def load(self) -> None:
        """Load the models and open the folder before the first shard."""
        _ = self.folder

    def process(self, shard: int, on_image: Callable[[], None] = lambda: None) -> tuple[ShardHeader, StageTimes]:
        """Process one shard, call `on_image` for each of its images, and return its header and times."""
        clock, job = StageClock(on_image), self._job
        header = process_shard(self.folder, shard, self.stages, job.image_folder, job.workload, clock, job.retry)
        return header, clock.times


class Rank(NamedTuple):
    """This process among those that share the shards."""

    number: int
    world_size: int
    device: str  # of its models

    def shards(self, folder: RunFolder) -> list[int]:
        """Return this process's shards, done or not. Owners are fixed, so processes need no communication."""
        return list(range(self.number, folder.num_shards, self.world_size))


def rank_of(engine: Engine, device: str, environment: Mapping[str, str] = os.environ) -> Rank:
    """Return this process's rank and device; `ValueError` if several processes are all `local`.

    `torchrun` reads RANK, WORLD_SIZE and LOCAL_RANK, which torchrun or the script of a Slurm array sets. The device
    `auto` is the GPU of the local rank, or the CPU.
    """
    rank, world_size = environment.get("RANK"), environment.get("WORLD_SIZE")
    if engine == "torchrun":
        if rank is None or world_size is None:
            raise ValueError(
                "--engine torchrun: found no RANK and WORLD_SIZE, which torchrun sets. Start it with `torchrun "
                "--nproc_per_node 8 --no_python patch-aligned annotate ...`, or set both in the script of a Slurm array"
            )
        local_rank = environment.get("LOCAL_RANK", "0")
        if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
            raise ValueError(f"RANK, WORLD_SIZE: found {rank!r} and {world_size!r}, expected 0 to WORLD_SIZE - 1")
        if not local_rank.isdecimal():
            raise ValueError(f"LOCAL_RANK: found {local_rank!r}, expected this process's number on its machine, from 0")
        return Rank(int(rank), int(world_size), _device(device, int(local_rank)))
    if engine == "local" and world_size not in (None, "", "1"):
        raise ValueError(
            f"--engine local: found WORLD_SIZE {world_size}, so that each of {world_size} processes would do all the "
            "work. Pass --engine torchrun"
        )
    return Rank(0, 1, _device(device, 0))


def _device(device: str, local_rank: int) -> str:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return f"cuda:{local_rank % gpus}" if gpus else "cpu"
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device: found {device!r}, expected `auto`, `cpu` or `cuda:1`") from error
    if parsed.type != "cuda":
        return device
    if not gpus:
        raise ValueError(f"--device {device}: torch sees no CUDA device here. Pass --device cpu")
    if parsed.index is None:  # `cuda` alone would be the first GPU to every process
        return f"cuda:{local_rank % gpus}"
    if parsed.index >= gpus:
        raise ValueError(f"--device {device}: found {gpus} GPUs here, expected cuda:0 to cuda:{gpus - 1}")
    return device


def run_here(job: AnnotationJob, rank: Rank, report: ProgressReport) -> RunFolder:
    """Process this rank's shards that are not done, or have records to try again."""
    worker = ShardWorker(job, rank.device)
    folder = worker.folder
    todo = [shard for shard in rank.shards(folder) if folder.is_left(shard, job.retry)]
    report.opened(folder, todo)
    for shard in todo:
        report.finished(*worker.process(shard, report.image_done))
    return folder


def run_with_ray(job: AnnotationJob, workers: int | None, device: str, report: ProgressReport) -> RunFolder:
    """Process all shards that are not done with Ray's actors, each with a GPU where there are any.

    Joins the cluster at RAY_ADDRESS, or starts one here. All nodes need the same paths. An actor that dies is started
    again by Ray, and its shard is processed again. There are `workers` actors, by default one for each GPU of the
    cluster, or 1. The device is `auto` for GPUs where there are any, `cuda` to require them, `cpu` for none.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool
    except ImportError as error:
        raise ValueError("--engine ray: Ray is not installed: pip install 'patch-aligned-llava[annotate]'") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
        if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not gpus):
            raise ValueError(
                f"--engine ray --device {device}: found {gpus} GPUs in the cluster, of which Ray gives each actor one; "
                "expected --device `auto`, `cpu`, or `cuda` where there are any"
            )
        if gpus and (workers or 0) > gpus:
            raise ValueError(
                f"--ray_workers {workers}: found {gpus} GPUs in the cluster, expected no more workers: each "
                "takes one, the others would wait for ever"
            )
        # Ray shows each actor its own GPU alone, which is cuda:0 to it.
        actor_class = ray.remote(num_gpus=1 if gpus else 0, max_restarts=-1, max_task_retries=3)(ShardWorker)
        shared_job = ray.put(job)
        actors: list[Any] = [
            actor_class.remote(shared_job, "cuda:0" if gpus else "cpu") for _ in range(workers or gpus or 1)
        ]
        ray.get([actor.load.remote() for actor in actors])
        folder = RunFolder(job.output)
        todo = [shard for shard in range(folder.num_shards) if folder.is_left(shard, job.retry)]
        report.opened(folder, todo)
        for header, times in ActorPool(actors).map_unordered(lambda actor, shard: actor.process.remote(shard), todo):
            report.finished(header, times)
        return folder
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError | ImportError):
            raise error.cause from None  # wrong input, without the actor's traceback in the message
        raise
    except RayError as error:
        raise ValueError(
            f"--engine ray: an actor died repeatedly ({str(error).strip().splitlines()[0]}). Finished shards are kept: "
            "once the cause is fixed, run the same command again. It is most often too little memory: use fewer "
            "--ray_workers, or a smaller --chunk"
        ) from error
    finally:
        if is_ours:
            ray.shutdown()


_SECONDS_BETWEEN_LINES = 60.0  # in a log of all processes together, beside the line that each shard gets

BeginRecord = Callable[[RunFolder], Callable[[], None]]
"""Writes into a folder that work on it has begun; the function that it returns writes that it has ended."""


class ProgressReport:
    """Progress of one process: in a terminal the bar `progress`, lines elsewhere, and a log of its shards."""

    def __init__(self, console: Console, rank: Rank, begin_record: BeginRecord | None = None) -> None:
        self._console, self._rank = console, rank
        self._begin_record = begin_record if rank.number == 0 else None
        self.ended: Callable[[], None] = lambda: None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rates]}"),
            console=console,
            disable=not console.is_terminal or rank.number > 0,
        )

    def opened(self, folder: RunFolder, todo: Sequence[int]) -> None:
        """Report the shards that are left to do."""
        if self._begin_record and todo:
            self.ended = self._begin_record(folder)
        self._log = folder.path / "logs" / f"rank-{self._rank.number:05d}.jsonl"
        self._todo, self._done = len(todo), 0
        self._images = sum(len(folder.entries_of(shard)) for shard in todo)
        self._images_done = self._images_in_shards = 0
        self._begin = self._last_line = time.perf_counter()
        self._task = self.progress.add_task("Annotating", total=self._images, rates="")
        self._console.print(
            f"{folder.path}: {len(folder.entries):,} images in {folder.num_shards} shards; "
            f"{len(todo)} shards are left for this process (rank {self._rank.number})",
            soft_wrap=True,
        )

    def image_done(self) -> None:
        """Count an image of this process; those of Ray's actors are counted by the shard."""
        self._images_done += 1
        self.progress.update(self._task, completed=self._images_done)
        since_last = time.perf_counter() - self._last_line
        if self.progress.disable and since_last >= _SECONDS_BETWEEN_LINES * self._rank.world_size:
            self._print(f"rank {self._rank.number}: {self._images_done:,} of {self._images:,} images")

    def finished(self, header: ShardHeader, times: StageTimes) -> None:
        """Count a shard, and write its line of the log."""
        self._done += 1
        self._images_in_shards += header.count
        self._images_done = self._images_in_shards  # images that were tried twice count once
        seconds = {stage: round(taken.seconds, 3) for stage, taken in times.items()}
        line = {"time": time.time(), "shard": header.shard, "counts": header.counts, "seconds": seconds}
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        rates = ", ".join(f"{name} {t.images / t.seconds:.1f}/s" for name, t in times.items() if t.seconds > 0)
        self.progress.update(self._task, completed=self._images_done, rates=rates)
        if self.progress.disable:
            counts = ", ".join(f"{count} {status}" for status, count in header.counts.items())
            self._print(f"shard {header.shard:05d} ({self._done}/{self._todo}): {counts}; {rates}")

    def _print(self, text: str) -> None:
        self._last_line = time.perf_counter()
        elapsed = self._last_line - self._begin
        left = max(int(elapsed / self._images_done * (self._images - self._images_done)), 0)
        self._console.print(
            f"{text}; {self._images_done / elapsed:.1f} images/s, "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
            soft_wrap=True,
        )


def show_summary(console: Console, folder: RunFolder) -> None:
    """Print the images by status in all shards of the folder, whoever made them, and what is missing."""
    missing = set(folder.missing_shards())
    counts: Counter[str] = Counter()
    for shard in set(range(folder.num_shards)) - missing:
        counts.update(folder.read_header(shard).counts)
    table = Table("status", "images")
    for status, count in sorted(counts.items()):
        table.add_row(status, f"{count:,}")
    console.print(table)
    if failed := [status for status in FAILED_STATUSES if counts[status]]:
        console.print(
            f"Images that failed: {sum(counts[status] for status in failed):,}; their records say why. Once that is "
            f"fixed, try them again: the same command with --retry {','.join(failed)}",
            soft_wrap=True,
        )
    if missing:
        console.print(f"{len(missing)} of {folder.num_shards} shards are not there yet; other processes make them")
    else:
        console.print(
            f"All {folder.num_shards} shards are there. Next: patch-aligned merge {folder.path} --output pad.jsonl.gz",
            soft_wrap=True,
        )


def run_annotate(
    job: AnnotationJob,
    engine: Engine = "local",
    device: str = "auto",
    ray_workers: int | None = None,
    begin_record: BeginRecord | None = None,
) -> RunFolder:
    """Annotate the job's images with an engine; the other arguments are the options of the command.

    `begin_record` is called by the first process, once the folder is open and if something is left to do.
    """
    rank = Rank(0, 1, device) if engine == "ray" else rank_of(engine, device)
    console = Console()
    transformers_logging.disable_progress_bar()
    if rank.number == 0:
        console.print(f"{len(job.entries):,} images. Loading the models", soft_wrap=True)
    report = ProgressReport(console, rank, begin_record)
    with report.progress:
        if engine == "ray":
            folder = run_with_ray(job, ray_workers, device, report)
        else:
            folder = run_here(job, rank, report)
    report.ended()
    if rank.number == 0:
        show_summary(console, folder)
    return folder
