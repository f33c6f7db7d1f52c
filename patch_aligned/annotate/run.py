"""Who works on which shard: one process, several that share out the shards by their rank, or Ray's actors.

All of them call `process_shard` and nothing else, and all give the same files.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from patch_aligned.annotate.fetch import checkpoint_folder, commit_of, file_hashes
from patch_aligned.annotate.folder import (
    ManifestEntry,
    Record,
    RunFolder,
    ShardHeader,
    list_images,
    read_header,
    write_shard,
)
from patch_aligned.annotate.grounding_dino import GroundingDetector
from patch_aligned.annotate.pipeline import (
    STAGES,
    ModelStages,
    StageClock,
    Stages,
    StageTime,
    StageTimes,
    Workload,
    annotate_images,
)
from patch_aligned.annotate.ram.tagger import RamTagger, Resample
from patch_aligned.annotate.regions import CandidateThresholds, PromptJoin, Selection
from patch_aligned.annotate.sam import SamSegmenter
from patch_aligned.images import NO_SUCH_FILE, NOT_PERMITTED

# `process_shard`: all that is done to a shard's images, and the one function that every engine calls.
#
# A shard is worked on in chunks of some hundred images. Worker threads decode the next chunk while the models are busy
# with this one. Which images share a batch depends on the manifest and the batch sizes alone, so a shard's bytes don't
# depend on who makes it, when, or how often it was interrupted.

FAILED_STATUSES = ("unreadable", "out_of_memory", "non_finite")
"""Statuses of images that something went wrong with. The others say that there was nothing to annotate."""

STATUSES = ("ok", "no_tags", "no_boxes", "no_masks", "skipped", *FAILED_STATUSES)
"""All that a record may have."""


def process_shard(
    folder: RunFolder,
    shard: int,
    stages: Stages,
    image_folder: Path,
    workload: Workload,
    clock: StageClock | None = None,
    retry: Collection[str] = (),
) -> ShardHeader:
    """Annotates the images of a shard and writes its file.

    Args:
        folder: the run's.
        shard: its number.
        stages: what annotates.
        image_folder: what image ids count from.
        workload: how much at once.
        clock: counts seconds and images by stage.
        retry: if the shard is there, only its images of these statuses are annotated, again, and all other records stay
            as they are.

    Raises:
        ValueError: names the images that failed, where `on_error` is `fail`. Nothing is written then.
        OSError: the images can't be had now. Nothing is written either.
    """
    clock = clock or StageClock()
    entries = folder.entries_of(shard)
    records: list[Record] = [{} for _ in entries]
    rows = list(range(len(entries)))
    if retry and folder.is_done(shard):
        _, records = folder.read_shard(shard)
        rows = [row for row in rows if records[row]["status"] in retry]
    annotated = _annotated([entries[row] for row in rows], stages, image_folder, workload, clock)
    for row, record in zip(rows, annotated, strict=True):
        records[row] = record
    if not workload.allow_missing:
        _refuse_all_missing(records, image_folder)
    if workload.on_error == "fail":
        _refuse_failed(records)
    return write_shard(
        folder.shard_path(shard),
        records,
        shard=shard,
        first=folder.first_of(shard),
        settings_sha256=folder.settings_sha256,
    )


def _annotated(
    entries: list[ManifestEntry], stages: Stages, image_folder: Path, workload: Workload, clock: StageClock
) -> list[Record]:
    """One record for each image, in order; some chunks are in memory at a time."""
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
            runners.shutdown(wait=False, cancel_futures=True)  # or the other chunks would still be worked on
            raise
    if workload.chunks_at_once > 1:
        # Another chunk may have held the memory. Now each has the device for itself.
        for row, record in enumerate(records):
            if record["status"] == "out_of_memory":
                records[row] = annotate_images([entries[row]], stages, image_folder, workload, clock)[0]
    return records


def _refuse_all_missing(records: Sequence[Record], image_folder: Path) -> None:
    """A picture that isn't there is that picture's fault; if none of a shard can be had, the folder's."""
    if all(record["reason"] in (NO_SUCH_FILE, NOT_PERMITTED) for record in records):
        raise OSError(
            f"{image_folder}: none of the {len(records):,} images of a shard can be read, such as "
            f"{records[0]['image_id']!r} ({records[0]['reason']}). Nothing was recorded of them. Correct "
            "--image_folder, or mount the disk, and run the same command again, with --retry unreadable if earlier "
            "shards lack images too. If these are gone for good, add --allow_missing"
        )


def _refuse_failed(records: Sequence[Record]) -> None:
    failed = [record for record in records if record["status"] in FAILED_STATUSES]
    if failed:
        listed = "; ".join(f"{record['image_id']}: {record['status']} ({record['reason']})" for record in failed[:5])
        raise ValueError(
            f"{len(failed)} images failed, and their shard was not written: {listed}{'; ...' if failed[5:] else ''}. "
            "Mend them, or record them and go on with --on_error skip"
        )


def statuses_named(text: str) -> frozenset[str]:
    """The statuses of `--retry`: names with commas between them.

    Raises:
        ValueError: a name that no record has for its status.
    """
    names = frozenset(name.strip() for name in text.split(","))
    if unknown := names - set(STATUSES):
        raise ValueError(
            f"--retry {text}: found {', '.join(map(repr, sorted(unknown)))}, expected statuses with commas between "
            f"them: {', '.join(STATUSES)}"
        )
    return names


# What builds the stages, as plain values that can be sent to another process, and what settings.json says of them.

_DECIDING_PACKAGES = ("patch-aligned-llava", "torch", "transformers", "pillow", "numpy", "pycocotools")


class Recipe(Protocol):
    """What builds stages."""

    def build(self, device: str) -> Stages:
        """Stages on a device."""


@dataclass(frozen=True)
class ModelRecipe:
    """RAM, Grounding DINO and SAM, by their files.

    Attributes:
        ram: RAM's or RAM++'s weights.
        ram_tag_list: RAM's list of tags.
        ram_thresholds: their thresholds.
        detector: folder or hub name of Grounding DINO.
        sam: folder or hub name of SAM or SAM 2.
        detector_revision: on the hub.
        sam_revision: on the hub.
        resample: how pictures are resized for RAM.
        prompt_join: what joins the tags of a prompt.
        candidate_thresholds: below them a candidate isn't kept.
        selection: which candidates become regions.
        segment_candidates: whether all candidates get a mask.
        dtype: what models compute in, by name; `auto` is bfloat16 on a GPU and float32 on a CPU.
    """

    ram: Path
    ram_tag_list: Path
    ram_thresholds: Path
    detector: str
    sam: str
    detector_revision: str = "main"
    sam_revision: str = "main"
    resample: Resample = "bilinear"
    prompt_join: PromptJoin = ", "
    candidate_thresholds: CandidateThresholds = CandidateThresholds()  # noqa: RUF009 - it can't change
    selection: Selection = field(default_factory=Selection)
    segment_candidates: bool = False
    dtype: str = "auto"

    def build(self, device: str) -> Stages:
        """Loads the models.

        Raises:
            ValueError: names the file that is missing or broken, and the flag that names it.
        """
        self.selection.require_within(self.candidate_thresholds)  # first: cheaper to fail on
        dtype: torch.dtype | None = None if self.dtype == "auto" else getattr(torch, self.dtype)
        detector_folder = checkpoint_folder(self.detector, self.detector_revision, "--detector")
        sam_folder = checkpoint_folder(self.sam, self.sam_revision, "--sam")
        tagger = RamTagger.from_checkpoint(
            self.ram, self.ram_tag_list, self.ram_thresholds, device=device, dtype=dtype, resample=self.resample
        )
        detector = GroundingDetector.from_pretrained(
            str(detector_folder),
            device=device,
            dtype=dtype,
            prompt_join=self.prompt_join,
            candidate_thresholds=self.candidate_thresholds,
        )
        segmenter = SamSegmenter.from_pretrained(str(sam_folder), device=device, dtype=dtype)
        # Where the files are doesn't decide anything; what is in them does.
        detector.settings |= _identity(self.detector, detector_folder)
        segmenter.settings |= _identity(self.sam, sam_folder)
        return ModelStages(tagger, detector, segmenter, self.selection, segment_candidates=self.segment_candidates)


def settings_of(stages: Stages, min_side: int, max_aspect: float) -> dict[str, Any]:
    """What decides the records, for settings.json: the models, which images are skipped, and versions of packages."""
    return {
        **stages.settings,
        "min_side": min_side,
        "max_aspect": max_aspect,
        "versions": {package: version(package) for package in _DECIDING_PACKAGES},
    }


def _identity(name_or_folder: str, folder: Path) -> dict[str, Any]:
    is_local = Path(name_or_folder) == folder
    return {
        "model": folder.resolve().name if is_local else name_or_folder,
        "revision": commit_of(folder, is_from_hub=not is_local),
        "files_sha256": file_hashes(folder),
    }


# One annotation run as plain values, and the worker that does its shards, in whichever process.


@dataclass(frozen=True)
class AnnotationJob:
    """What to do.

    Attributes:
        entries: images, in the manifest's order.
        image_folder: what their ids count from.
        output: the run's folder.
        recipe: what builds the stages.
        workload: how much at once.
        shard_size: images a shard.
        retry: statuses of records that are made anew in shards that are there.
    """

    entries: list[ManifestEntry]
    image_folder: Path
    output: Path
    recipe: Recipe
    workload: Workload
    shard_size: int = 2000
    retry: frozenset[str] = frozenset()


class ShardWorker:
    """The models on one device, at work on one shard at a time.

    Nothing is loaded before it is needed: to Ray's user an error of the constructor would be a dead actor, one of a
    method is itself.
    """

    def __init__(self, job: AnnotationJob, device: str) -> None:
        self._job = job
        self._device = device
        self._loaded: tuple[Stages, RunFolder] | None = None

    def ready(self) -> None:
        """Loads the models and opens the folder, unless that is done.

        Raises:
            ValueError: a model that doesn't load, or a folder that was begun with other settings.
        """
        self._load()

    @property
    def folder(self) -> RunFolder:
        """The run's, made or opened with the settings of this worker's models; see `ready`."""
        return self._load()[1]

    def process(self, shard: int, on_image: Callable[[], None] = lambda: None) -> tuple[ShardHeader, StageTimes]:
        """Does one shard, calls `on_image` for each of its images, and returns its header and what it took."""
        stages, folder = self._load()
        clock, job = StageClock(on_image), self._job
        header = process_shard(folder, shard, stages, job.image_folder, job.workload, clock, job.retry)
        return header, clock.times

    def _load(self) -> tuple[Stages, RunFolder]:
        if self._loaded is None:
            job = self._job
            stages = job.recipe.build(self._device)
            settings = settings_of(stages, job.workload.min_side, job.workload.max_aspect)
            self._loaded = stages, RunFolder.start(job.output, job.entries, settings, job.shard_size)
        return self._loaded


Engine = Literal["local", "torchrun", "ray"]


class Watcher(Protocol):
    """Who looks on."""

    def opened(self, folder: RunFolder, todo: Sequence[int]) -> None:
        """Called once, with the shards that are left to do."""

    def image_done(self) -> None:
        """Called for each image that is done in this process; not for those of Ray's actors."""

    def finished(self, header: ShardHeader, times: StageTimes) -> None:
        """Called with each shard that was done, and what it took."""


@dataclass(frozen=True)
class Place:
    """This process among those that share the shards.

    Attributes:
        rank: its number.
        world_size: how many there are.
        device: what its models run on.
    """

    rank: int
    world_size: int
    device: str

    def shards(self, folder: RunFolder) -> list[int]:
        """Shards that are this process's, done or not. A shard's owner is fixed: nothing has to be agreed upon."""
        return list(range(self.rank, folder.num_shards, self.world_size))


def place_of(engine: Engine, device: str, environment: Mapping[str, str] = os.environ) -> Place:
    """Where this process stands.

    Args:
        engine: `local` is the only process, `torchrun` reads RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets, or
            the job script of a Slurm array.
        device: as given; `auto` is the GPU of this process's local rank, or the CPU.
        environment: variables.

    Raises:
        ValueError: several processes that all are `local`, or none of the variables.
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
        return Place(int(rank), int(world_size), _device(device, int(local_rank)))
    if engine == "local" and world_size not in (None, "", "1"):
        raise ValueError(
            f"--engine local: found WORLD_SIZE {world_size}, so that each of {world_size} processes would do all the "
            "work. Pass --engine torchrun"
        )
    return Place(0, 1, _device(device, 0))


def _device(device: str, local_rank: int) -> str:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return f"cuda:{local_rank % gpus}" if gpus else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device: found {device!r}, expected `auto`, `cpu` or `cuda:1`") from error
    if asked.type != "cuda":
        return device
    if not gpus:
        raise ValueError(f"--device {device}: torch sees no CUDA device here. Pass --device cpu")
    if asked.index is None:  # `cuda` alone would be the first GPU to every process
        return f"cuda:{local_rank % gpus}"
    if asked.index >= gpus:
        raise ValueError(f"--device {device}: found {gpus} GPUs here, expected cuda:0 to cuda:{gpus - 1}")
    return device


def run_here(job: AnnotationJob, place: Place, watcher: Watcher) -> RunFolder:
    """Does this process's shards that aren't done, or have records to try again."""
    worker = ShardWorker(job, place.device)
    todo = [shard for shard in place.shards(worker.folder) if worker.folder.is_left(shard, job.retry)]
    watcher.opened(worker.folder, todo)
    for shard in todo:
        watcher.finished(*worker.process(shard, watcher.image_done))
    return worker.folder


def run_with_ray(job: AnnotationJob, workers: int | None, device: str, watcher: Watcher) -> RunFolder:
    """Does all shards that aren't done with Ray's actors, each with a GPU where there are any.

    Takes part in the cluster that RAY_ADDRESS names, or starts one here. All nodes need the same paths. An actor that
    dies is started again by Ray, and its shard is done anew.

    Args:
        job: what to do.
        workers: actors; by default one for each GPU of the cluster, or 1.
        device: `auto` for GPUs where there are any, `cuda` to insist on them, `cpu` for none.
        watcher: looks on.

    Raises:
        ValueError: if Ray isn't installed, there are more workers than GPUs, none where they are insisted on, or an
            actor that is started again still dies.
        ValueError, OSError, ImportError: what an actor raised.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool
    except ImportError as error:
        raise ValueError("--engine ray: Ray isn't installed: pip install 'patch-aligned-llava[annotate]'") from error
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
        ray.get([actor.ready.remote() for actor in actors])
        folder = RunFolder(job.output)
        todo = [shard for shard in range(folder.num_shards) if folder.is_left(shard, job.retry)]
        watcher.opened(folder, todo)
        done = ActorPool(actors).map_unordered(lambda actor, shard: actor.process.remote(shard), todo)
        for header, times in done:
            watcher.finished(header, times)
        return folder
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | OSError | ImportError):
            raise error.cause from None  # wrong input, without the actor's traceback in the message
        raise
    except RayError as error:
        raise ValueError(
            f"--engine ray: an actor died again and again ({str(error).strip().splitlines()[0]}). What is done stays: "
            "once that is mended, run the same command again. Too little memory is the commonest cause: fewer "
            "--ray_workers, or a smaller --chunk"
        ) from error
    finally:
        if is_ours:
            ray.shutdown()


# What a run shows while it works: a bar with images a second by stage in a terminal, lines elsewhere, and a log.

_SECONDS_BETWEEN_LINES = 60.0  # in a log of all processes together, beside the line that each shard gets


BeginRecord = Callable[[RunFolder], Callable[[], None]]
"""Writes into a folder that work on it has begun; what it returns, that it has ended."""


class ProgressReport:
    """Looks on at one process's shards; to be used in a `with` block."""

    def __init__(self, console: Console, place: Place, begin_record: BeginRecord | None = None) -> None:
        self._console = console
        self._begin_record = begin_record if place.rank == 0 else None
        self._end_record: Callable[[], None] | None = None
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

    def __exit__(self, error: object, *_: object) -> None:
        self._progress.stop()
        if self._end_record and error is None:
            self._end_record()

    def opened(self, folder: RunFolder, todo: Sequence[int]) -> None:
        """Says what is left to do."""
        self._folder = folder
        if self._begin_record and todo:
            self._end_record = self._begin_record(folder)
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


# What `patch-aligned annotate` does: list the images, choose an engine, watch it, sum up.


def run_annotate(
    *,
    images: Path,
    image_folder: Path | None,
    output: Path,
    recipe: Recipe,
    workload: Workload,
    engine: Engine,
    shard_size: int,
    device: str,
    ray_workers: int | None,
    retry: frozenset[str] = frozenset(),
    begin_record: BeginRecord | None = None,
) -> RunFolder:
    """Annotates images into `output`; the arguments are the options of the command.

    `begin_record` is called by the first process, once the folder is open and if something is left to do.

    Raises:
        ValueError: an input does not fit; the message says which and what to do.
        OSError: a file or folder is missing or broken.
    """
    place = Place(0, 1, device) if engine == "ray" else place_of(engine, device)
    entries, root = list_images(images, image_folder)
    # Ray's workers may start in another folder.
    job = AnnotationJob(entries, root.resolve(), output.resolve(), recipe, workload, shard_size, retry)
    console = Console()
    transformers_logging.disable_progress_bar()
    if place.rank == 0:
        console.print(f"{len(entries):,} images. Loading the models", soft_wrap=True)
    with ProgressReport(console, place, begin_record) as report:
        if engine == "ray":
            folder = run_with_ray(job, ray_workers, device, report)
        else:
            folder = run_here(job, place, report)
    if place.rank == 0:
        show_summary(console, folder)
    return folder
