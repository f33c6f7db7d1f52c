"""`process_shard`: all that is done to a shard's images, and the one function that every engine calls.

A shard is worked on in chunks of some hundred images. Worker threads decode the next chunk while the models are busy
with this one. A chunk's images are decoded once and stay in memory through the stages: tagged in large batches,
detected in buckets of equal size, segmented where boxes were found. Which images share a batch depends on the manifest
and the batch sizes alone, so a shard's bytes don't depend on who makes it, when, or how often it was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from patch_aligned.annotate.batches import Failure, run_in_batches
from patch_aligned.annotate.candidates import Candidate
from patch_aligned.annotate.decoding import UnreadableImageError, decode_image
from patch_aligned.annotate.manifest import ManifestEntry
from patch_aligned.annotate.ram.tagger import Tag
from patch_aligned.annotate.run_folder import RunFolder
from patch_aligned.annotate.sam import Mask
from patch_aligned.annotate.shards import Record, ShardHeader, write_shard
from patch_aligned.annotate.stage_clock import StageClock
from patch_aligned.annotate.stages import ImageInWork, Stages

Result = TypeVar("Result")

FAILED_STATUSES = ("unreadable", "out_of_memory", "non_finite")
"""Statuses of images that something went wrong with. The others say that there was nothing to annotate."""


class FailedImageError(ValueError):
    """An image that failed, where `on_error` is `fail`."""


@dataclass(frozen=True)
class Workload:
    """How much is done at once, and which images aren't tried.

    Attributes:
        tag_batch: images tagged at a time.
        detect_batch: images of equal size detected at a time.
        segment_batch: images segmented at a time.
        chunk: images in memory at a time, twice as many with those that are being decoded.
        decode_workers: threads that decode.
        chunks_at_once: 2 lets the next chunk be decoded and prepared while this one is on the device; 1 doesn't.
        min_side: in pixels; an image with a shorter side is skipped.
        max_aspect: an image whose sides differ by a larger factor is skipped.
        on_error: `skip` records what went wrong and goes on, `fail` stops after the shard.
    """

    tag_batch: int = 64
    detect_batch: int = 8
    segment_batch: int = 8
    chunk: int = 256
    decode_workers: int = 8
    chunks_at_once: int = 2
    min_side: int = 16
    max_aspect: float = 10.0
    on_error: Literal["skip", "fail"] = "skip"


def process_shard(
    folder: RunFolder,
    shard: int,
    stages: Stages,
    image_folder: Path,
    workload: Workload,
    clock: StageClock | None = None,
) -> ShardHeader:
    """Annotates the images of a shard and writes its file.

    Args:
        folder: the run's.
        shard: its number.
        stages: what annotates.
        image_folder: what image ids count from.
        workload: how much at once.
        clock: counts seconds and images by stage.

    Raises:
        FailedImageError: names the images that failed, where `on_error` is `fail`. Nothing is written then.
    """
    clock = clock or StageClock()
    entries = folder.entries_of(shard)
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
    if workload.on_error == "fail":
        _refuse_failed(records)
    return write_shard(
        folder.shard_path(shard),
        records,
        shard=shard,
        first=folder.first_of(shard),
        settings_sha256=folder.settings_sha256,
    )


def _refuse_failed(records: Sequence[Record]) -> None:
    failed = [record for record in records if record["status"] in FAILED_STATUSES]
    if failed:
        listed = "; ".join(f"{record['image_id']}: {record['status']} ({record['reason']})" for record in failed[:5])
        raise FailedImageError(
            f"{len(failed)} images failed, and their shard was not written: {listed}{'; ...' if failed[5:] else ''}. "
            "Mend them, or record them and go on with --on_error skip"
        )


def annotate_images(
    entries: Sequence[ManifestEntry],
    stages: Stages,
    image_folder: Path,
    workload: Workload,
    clock: StageClock,
    decoders: Executor | None = None,
) -> list[Record]:
    """One record for each image, in order. All of them are in memory at once."""
    work = _Work(entries, stages, workload, clock)
    work.decode(image_folder, decoders)
    work.tag()
    work.detect()
    work.segment()
    return [work.records[entry.image_id] for entry in entries]


class _Work:
    """The images of a chunk: their records as they stand, and those that are still in work."""

    def __init__(self, entries: Sequence[ManifestEntry], stages: Stages, workload: Workload, clock: StageClock) -> None:
        self.entries = entries
        self.stages = stages
        self.workload = workload
        self.clock = clock
        self.items: list[ImageInWork] = []
        self.records: dict[str, Record] = {entry.image_id: _empty_record(entry) for entry in entries}

    def decode(self, image_folder: Path, decoders: Executor | None) -> None:
        def attempt(entry: ManifestEntry) -> Image.Image | Failure:
            try:
                return decode_image(image_folder / entry.image_id)
            except UnreadableImageError as error:
                return Failure("unreadable", str(error))
            except MemoryError:
                return Failure("out_of_memory", "does not fit in memory when decoded")

        with self.clock.measure("decode", len(self.entries)):
            outcomes = list(decoders.map(attempt, self.entries) if decoders else map(attempt, self.entries))
        for entry, outcome in zip(self.entries, outcomes, strict=True):
            if isinstance(outcome, Failure):
                self._end(entry.image_id, *outcome)
                continue
            self.records[entry.image_id]["size"] = list(outcome.size)
            shorter, longer = sorted(outcome.size)
            if shorter < self.workload.min_side:
                self._end(entry.image_id, "skipped", f"a side of {shorter} px, less than {self.workload.min_side}")
            elif longer > self.workload.max_aspect * shorter:
                self._end(entry.image_id, "skipped", f"sides of {longer} and {shorter} px: too narrow to be resized")
            else:
                self.items.append(ImageInWork(entry.image_id, outcome))

    def tag(self) -> None:
        def keep(item: ImageInWork, tags: list[Tag]) -> None:
            item.tags = tags
            self.records[item.image_id]["tags"] = [tag._asdict() for tag in tags]
            if not tags:
                self._end(item.image_id, "no_tags")

        self._run("tag", self.stages.tag, self.items, self.workload.tag_batch, keep)

    def detect(self) -> None:
        def keep(item: ImageInWork, candidates: list[Candidate]) -> None:
            item.candidates = candidates
            item.selected = self.stages.select(item)
            item.to_segment = [selected.position for selected in item.selected]
            if self.stages.segment_candidates:
                item.to_segment = list(range(len(candidates)))
            self.records[item.image_id]["candidates"] = [candidate.to_record() for candidate in candidates]
            if not item.to_segment:
                self._end(item.image_id, "no_boxes")

        buckets: dict[Hashable, list[ImageInWork]] = {}
        for item in self.items:
            buckets.setdefault(self.stages.bucket(item), []).append(item)
        for items in buckets.values():
            self._run("detect", self.stages.detect, items, self.workload.detect_batch, keep)

    def segment(self) -> None:
        def keep(item: ImageInWork, masks: list[Mask]) -> None:
            if not all(math.isfinite(mask.predicted_iou) for mask in masks):
                self._end(item.image_id, "non_finite", "segment: the model's scores are not finite")
                return
            record = self.records[item.image_id]
            mask_of = {
                position: {"rle_mask": mask.rle, "area_px": mask.area_px, "predicted_iou": mask.predicted_iou}
                for position, mask in zip(item.to_segment, masks, strict=True)
            }
            record["labels"] = [
                selected.to_label(mask_of[selected.position])
                for selected in item.selected
                if mask_of[selected.position]["area_px"]
            ]
            for position in mask_of.keys() - {selected.position for selected in item.selected}:
                record["candidates"][position] |= mask_of[position]
            if empty := [position for position, mask in mask_of.items() if not mask["area_px"]]:
                record["empty_masks"] = empty
            self._end(item.image_id, "ok" if record["labels"] else "no_masks" if item.selected else "no_boxes")

        self._run("segment", self.stages.segment, self.items, self.workload.segment_batch, keep)

    def _run(
        self,
        name: str,
        stage: Callable[[Sequence[ImageInWork]], Sequence[Result]],
        items: list[ImageInWork],
        batch_size: int,
        keep: Callable[[ImageInWork, Result], None],
    ) -> None:
        with self.clock.measure(name, len(items)):
            outcomes = run_in_batches(stage, items, batch_size)
        for item, outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, Failure):
                self._end(item.image_id, outcome.status, f"{name}: {outcome.reason}")
            else:
                keep(item, outcome)
        # Lets go of the images that no later stage needs.
        self.items = [item for item in self.items if not self.records[item.image_id]["status"]]

    def _end(self, image_id: str, status: str, reason: str | None = None) -> None:
        self.records[image_id] |= {"status": status, "reason": reason}


def _empty_record(entry: ManifestEntry) -> Record:
    return {
        "image_id": entry.image_id,
        "size": None,
        "caption": entry.caption,
        "labels": [],
        "status": "",
        "reason": None,
        "tags": [],
        "candidates": [],
    }
