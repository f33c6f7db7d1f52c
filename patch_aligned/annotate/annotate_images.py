"""The images of a chunk through all stages: decoded once, tagged, detected, segmented, and one record for each.

They are decoded once and stay in memory through the stages: tagged in large batches, detected in buckets of equal size,
segmented where boxes were found. Which images share a batch depends on the images and the batch sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from patch_aligned.annotate.batches import Failure, run_in_batches
from patch_aligned.annotate.candidates import Candidate
from patch_aligned.annotate.decoding import UnreadableImageError, decode_image
from patch_aligned.annotate.manifest import ManifestEntry
from patch_aligned.annotate.ram.tagger import Tag
from patch_aligned.annotate.sam import Mask
from patch_aligned.annotate.shards import Record
from patch_aligned.annotate.stage_clock import StageClock
from patch_aligned.annotate.stages import ImageInWork, Stages

Result = TypeVar("Result")


@dataclass(frozen=True)
class Workload:
    """How much is done at once, and which images aren't tried.

    Attributes:
        tag_batch: images tagged at a time.
        detect_batch: images of equal size detected at a time.
        segment_batch: images segmented at a time.
        chunk: images of a chunk, which are in memory together.
        decode_workers: threads that decode.
        chunks_at_once: how many are in memory: with 2 the next one is decoded and prepared while this one is on the
            device, with more others too, where preparing takes longer.
        min_side: in pixels; an image with a shorter side is skipped.
        max_aspect: an image whose sides differ by a larger factor is skipped.
        on_error: `skip` records what went wrong and goes on, `fail` stops after the shard.
        allow_missing: whether a shard of whose images none is there is recorded so, and not taken for an outage.
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
    allow_missing: bool = False


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
            for item, outcome in zip(items, run_in_batches(stage, items, batch_size), strict=True):
                if isinstance(outcome, Failure):
                    self._end(item.image_id, outcome.status, f"{name}: {outcome.reason}")
                else:
                    keep(item, outcome)
        # Lets go of the images that no later stage needs.
        self.items = [item for item in self.items if not self.records[item.image_id]["status"]]

    def _end(self, image_id: str, status: str, reason: str | None = None) -> None:
        self.records[image_id] |= {"status": status, "reason": reason}
        self.clock.image_done()


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
