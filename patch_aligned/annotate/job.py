"""One annotation run as plain values, and the worker that does its shards, in whichever process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from patch_aligned.annotate.annotate_images import Workload
from patch_aligned.annotate.manifest import ManifestEntry
from patch_aligned.annotate.process_shard import process_shard
from patch_aligned.annotate.recipes import Recipe, settings_of
from patch_aligned.annotate.run_folder import RunFolder
from patch_aligned.annotate.shards import ShardHeader
from patch_aligned.annotate.stage_clock import StageClock, StageTimes
from patch_aligned.annotate.stages import Stages


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
