"""What is done to an image: it is decoded once, tagged, boxes are found for its tags, and a mask for each box.

Images of a chunk stay in memory through the stages: tagged in large batches, detected in batches of one size, segmented
where boxes were found. Which images share a batch depends on the images and the batch sizes alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from PIL import Image

from patch_aligned.annotate.folder import Record
from patch_aligned.annotate.manifest import ManifestEntry
from patch_aligned.annotate.options import Selection, Workload
from patch_aligned.annotate.regions import Candidate, Mask, NonFiniteScoresError, Tag, select
from patch_aligned.images import UnreadableImageError, decode_image

_logger = logging.getLogger(__name__)


@dataclass
class ImageInWork:
    """A decoded image on its way through the stages."""

    image_id: str
    image: Image.Image
    caption: str = ""
    tags: list[Tag] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)  # at low thresholds and before NMS
    selected: list[int] = field(default_factory=list)  # positions of the candidates that become regions
    to_segment: list[int] = field(default_factory=list)  # positions of those that get a mask: the selected ones, or all


class Stages(Protocol):
    """What annotates a batch of decoded images: one result an image, or why it has none."""

    settings: dict[str, Any]  # all that determines the results, as plain values for settings.json
    selection: Selection  # which candidates become regions
    segment_candidates: bool  # whether all candidates get a mask, so that others can be selected later

    def tag(self, items: Sequence[ImageInWork]) -> Sequence[list[Tag] | Failure]:
        """Tag each image."""

    def bucket(self, item: ImageInWork) -> Hashable:
        """Images of one bucket are detected together: the model sees them in one size, so that none is padded."""

    def detect(self, items: Sequence[ImageInWork]) -> Sequence[list[Candidate] | Failure]:
        """Find candidates for each image's tags."""

    def segment(self, items: Sequence[ImageInWork]) -> Sequence[Sequence[Mask]]:
        """Make a mask for each candidate of each image that is `to_segment`."""


# A stage in batches, where a batch may be too large, or an image may break it.

Item = TypeVar("Item")
Result = TypeVar("Result")


class Failure(NamedTuple):
    """Why an item has no result; `reason` is the same on every machine, as it is stored in the shard."""

    status: str
    reason: str


_OUT_OF_MEMORY = Failure("out_of_memory", "does not fit in memory, even alone")
_NON_FINITE = Failure("non_finite", "the model's scores are not finite, also in float32")


def run_in_batches(
    stage: Callable[[Sequence[Item]], Sequence[Result | Failure]], items: Sequence[Item], batch_size: int
) -> Iterator[Result | Failure]:
    """Yield the result of `stage` for each item, in order, as soon as its batch is done.

    A batch that does not fit in memory is halved until it does. An item that does not fit alone fails, as does one
    whose scores are not finite; the others of its batch are not affected. Other errors of `stage` are raised: they are
    a bug or a broken machine.
    """
    for start in range(0, len(items), batch_size):
        yield from _run(stage, items[start : start + batch_size])


def _run(
    stage: Callable[[Sequence[Item]], Sequence[Result | Failure]], batch: Sequence[Item]
) -> list[Result | Failure]:
    if not batch:
        return []
    try:
        return [*stage(batch)]
    except NonFiniteScoresError as error:
        broken = set(error.positions)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        broken = set()
        _logger.warning("A batch of %d does not fit in memory: %s", len(batch), error)
    # Outside of the except blocks, as their traceback keeps the failed batch's tensors alive.
    if broken:
        others = iter(_run(stage, [item for position, item in enumerate(batch) if position not in broken]))
        return [_NON_FINITE if position in broken else next(others) for position in range(len(batch))]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) == 1:
        return [_OUT_OF_MEMORY]
    half = -(-len(batch) // 2)
    return [*_run(stage, batch[:half]), *_run(stage, batch[half:])]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "_ALLOC_FAILED")
    )


# The time of each stage, for the progress bar, the log and the benchmark. Never part of the data.

STAGES = ("decode", "tag", "detect", "segment")


@dataclass
class StageTime:
    """Images of a stage, and its wall time with waiting; chunks that are processed at the same time each count."""

    images: int = 0
    seconds: float = 0.0


StageTimes = dict[str, StageTime]
"""By stage."""


class StageClock:
    """Measures the stages of any number of threads in `times`, and calls `on_image` for each finished image.

    `on_image` is never called by two threads at once.
    """

    def __init__(self, on_image: Callable[[], None] = lambda: None) -> None:
        self.times: StageTimes = {stage: StageTime() for stage in STAGES}
        self._on_image = on_image
        self._lock = threading.Lock()

    def image_done(self) -> None:
        """Record that an image has its record."""
        with self._lock:
            self._on_image()

    @contextmanager
    def measure(self, stage: str, images: int) -> Iterator[None]:
        """Add the block's time and `images` to a stage."""
        begin = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begin
        with self._lock:
            self.times[stage].images += images
            self.times[stage].seconds += elapsed


def annotate_images(
    entries: Sequence[ManifestEntry],
    stages: Stages,
    image_folder: Path,
    workload: Workload,
    clock: StageClock,
    decoders: Executor | None = None,
) -> list[Record]:
    """Return one record for each image, in order. All images are in memory at once."""
    work = _Work(entries, stages, workload, clock)
    work.decode(image_folder, decoders)
    work.tag()
    work.detect()
    work.segment()
    return [work.records[entry.image_id] for entry in entries]


class _Work:
    """The images of a chunk: their records so far, and those that are not finished yet."""

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
                self._finish(entry.image_id, *outcome)
                continue
            self.records[entry.image_id]["size"] = list(outcome.size)
            shorter, longer = sorted(outcome.size)
            if shorter < self.workload.min_side:
                self._finish(entry.image_id, "skipped", f"a side of {shorter} px, less than {self.workload.min_side}")
            elif longer > self.workload.max_aspect * shorter:
                self._finish(entry.image_id, "skipped", f"sides of {longer} and {shorter} px: too narrow to be resized")
            else:
                self.items.append(ImageInWork(entry.image_id, outcome, entry.caption))

    def tag(self) -> None:
        def keep(item: ImageInWork, tags: list[Tag]) -> None:
            item.tags = tags
            self.records[item.image_id]["tags"] = [tag._asdict() for tag in tags]
            if not tags:
                self._finish(item.image_id, "no_tags")

        self._run("tag", self.stages.tag, self.items, self.workload.tag_batch, keep)

    def detect(self) -> None:
        def keep(item: ImageInWork, candidates: list[Candidate]) -> None:
            item.candidates = candidates
            item.selected = select(candidates, self.stages.selection, item.image.size)
            item.to_segment = list(range(len(candidates))) if self.stages.segment_candidates else item.selected
            self.records[item.image_id]["candidates"] = [candidate.to_record() for candidate in candidates]
            if not item.to_segment:
                self._finish(item.image_id, "no_boxes")

        buckets: dict[Hashable, list[ImageInWork]] = {}
        for item in self.items:
            buckets.setdefault(self.stages.bucket(item), []).append(item)
        for items in buckets.values():
            self._run("detect", self.stages.detect, items, self.workload.detect_batch, keep)

    def segment(self) -> None:
        def keep(item: ImageInWork, masks: Sequence[Mask]) -> None:
            record = self.records[item.image_id]
            mask_of = dict(zip(item.to_segment, masks, strict=True))
            record["labels"] = [
                item.candidates[position].to_label(position, self.stages.selection, mask_of[position])
                for position in item.selected
                if mask_of[position]["area_px"]
            ]
            for position in mask_of.keys() - set(item.selected):
                record["candidates"][position] |= mask_of[position]
            if empty := [position for position, mask in mask_of.items() if not mask["area_px"]]:
                record["empty_masks"] = empty
            self._finish(item.image_id, "ok" if record["labels"] else "no_masks" if item.selected else "no_boxes")

        self._run("segment", self.stages.segment, self.items, self.workload.segment_batch, keep)

    def _run(
        self,
        name: str,
        stage: Callable[[Sequence[ImageInWork]], Sequence[Result | Failure]],
        items: list[ImageInWork],
        batch_size: int,
        keep: Callable[[ImageInWork, Result], None],
    ) -> None:
        with self.clock.measure(name, len(items)):
            for item, outcome in zip(items, run_in_batches(stage, items, batch_size), strict=True):
                if isinstance(outcome, Failure):
                    self._finish(item.image_id, outcome.status, f"{name}: {outcome.reason}")
                else:
                    keep(item, outcome)
        # Release the images that no later stage needs.
        self.items = [item for item in self.items if not self.records[item.image_id]["status"]]

    def _finish(self, image_id: str, status: str, reason: str | None = None) -> None:
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
