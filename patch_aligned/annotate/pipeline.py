"""The three stages of annotation behind one interface, and their implementation by models.

Tag the image, find boxes for its tags, make a mask for each box. Each stage takes a batch of images that are decoded
already and gives one result an image; it knows nothing of files, shards or failures.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from PIL import Image

from patch_aligned.annotate.folder import ManifestEntry, Record
from patch_aligned.annotate.grounding_dino import GroundingDetector
from patch_aligned.annotate.ram.tagger import RamTagger, Tag
from patch_aligned.annotate.regions import Candidate, NonFiniteScoresError, Selected, Selection, select
from patch_aligned.annotate.sam import Mask, SamSegmenter
from patch_aligned.images import UnreadableImageError, decode_image


@dataclass
class ImageInWork:
    """An image on its way through the stages.

    Attributes:
        image_id: its path below the image folder.
        image: decoded once.
        tags: from the first stage.
        candidates: from the second, at low thresholds and before boxes on the same object are suppressed.
        selected: those of them that become regions.
        to_segment: positions of the candidates that get a mask: the selected ones, or all.
    """

    image_id: str
    image: Image.Image
    tags: list[Tag] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    selected: list[Selected] = field(default_factory=list)
    to_segment: list[int] = field(default_factory=list)


class Stages(Protocol):
    """What annotates a batch of images.

    Attributes:
        settings: all that decides the results, as plain values for settings.json.
        segment_candidates: all candidates get a mask, so that others can be selected later.
    """

    settings: dict[str, Any]
    segment_candidates: bool

    def tag(self, items: Sequence[ImageInWork]) -> list[list[Tag]]:
        """Tags of each image."""

    def bucket(self, item: ImageInWork) -> Hashable:
        """Images of one bucket are detected together: the model sees them in one size, so that none is padded."""

    def detect(self, items: Sequence[ImageInWork]) -> list[list[Candidate]]:
        """Candidates of each image, for its tags."""

    def select(self, item: ImageInWork) -> list[Selected]:
        """Those of an image's candidates that become regions."""

    def segment(self, items: Sequence[ImageInWork]) -> list[list[Mask]]:
        """A mask for each candidate of each image that is `to_segment`."""


class ModelStages:
    """RAM, Grounding DINO and SAM."""

    def __init__(
        self,
        tagger: RamTagger,
        detector: GroundingDetector,
        segmenter: SamSegmenter,
        selection: Selection,
        *,
        segment_candidates: bool = False,
    ) -> None:
        """Puts the models in a row.

        Raises:
            ValueError: for thresholds below those at which the detector keeps candidates; or a tag that makes no
                prompt.
        """
        selection.require_within(detector.candidate_thresholds)
        detector.prompts.build(tagger.tags)  # or the first image that has such a tag would end the run
        self.tagger = tagger
        self.detector = detector
        self.segmenter = segmenter
        self.selection = selection
        self.segment_candidates = segment_candidates
        self.settings: dict[str, Any] = {
            "stages": "models",
            "ram": tagger.settings,
            "detector": detector.settings,
            "selection": asdict(selection),
            "segment_candidates": segment_candidates,
            "sam": segmenter.settings,
        }

    def tag(self, items: Sequence[ImageInWork]) -> list[list[Tag]]:
        """RAM's tags above their thresholds."""
        return self.tagger.tag([item.image for item in items])

    def bucket(self, item: ImageInWork) -> Hashable:
        """The size to which the detector resizes the image."""
        return self.detector.resized_shape_hw(item.image.size)

    def detect(self, items: Sequence[ImageInWork]) -> list[list[Candidate]]:
        """Grounding DINO's boxes for the tags."""
        return self.detector.detect([item.image for item in items], [[tag.name for tag in item.tags] for item in items])

    def select(self, item: ImageInWork) -> list[Selected]:
        """Thresholds, NMS and the choice of the label."""
        return select(item.candidates, self.selection, item.image.size)

    def segment(self, items: Sequence[ImageInWork]) -> list[list[Mask]]:
        """SAM's masks."""
        boxes = [[item.candidates[position].bbox_xyxy_px for position in item.to_segment] for item in items]
        return self.segmenter.segment([item.image for item in items], boxes)


# Running a stage over many images in batches, and what happens where a batch is too large or an image breaks it.

_logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Failure(NamedTuple):
    """Why an item has no result.

    Attributes:
        status: `out_of_memory` or `non_finite`.
        reason: in words; the same wherever it happens, as it goes into the shard.
    """

    status: str
    reason: str


_OUT_OF_MEMORY = Failure("out_of_memory", "does not fit in memory, even alone")
_NON_FINITE = Failure("non_finite", "the model's scores are not finite, also in float32")


def run_in_batches(
    stage: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], batch_size: int
) -> Iterator[Result | Failure]:
    """What `stage` makes of each item, in order, as soon as its batch is done.

    A batch that doesn't fit in memory is halved until it does. An item that doesn't fit alone fails, as does one whose
    scores aren't finite; the others of its batch don't suffer.

    Args:
        stage: takes a batch and returns one result an item.
        items: all of them.
        batch_size: items of a batch.

    Raises:
        Exception: any other error of `stage`, which is a bug or a broken machine.
    """
    for start in range(0, len(items), batch_size):
        yield from _run(stage, items[start : start + batch_size])


def _run(stage: Callable[[Sequence[Item]], Sequence[Result]], batch: Sequence[Item]) -> list[Result | Failure]:
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
    """Whether an error says that memory ran out, on whichever device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "_ALLOC_FAILED")
    )


# How long each stage took, for the progress bar, the log and the benchmark. Never part of the data.

STAGES = ("decode", "tag", "detect", "segment")


class StageTime(NamedTuple):
    """Images that a stage took, and how long.

    Attributes:
        images: their number.
        seconds: wall time, with what it waited for. Chunks that are worked on at once count each.
    """

    images: int = 0
    seconds: float = 0.0

    def __add__(self, other: StageTime) -> StageTime:  # type: ignore[override]
        return StageTime(self.images + other.images, self.seconds + other.seconds)


StageTimes = dict[str, StageTime]
"""By stage."""


class StageClock:
    """Counts the time of stages in any number of threads, and tells of each image that is done.

    Attributes:
        times: what was counted.
    """

    def __init__(self, on_image: Callable[[], None] = lambda: None) -> None:
        """Starts at nothing.

        Args:
            on_image: called when an image is done, never by two threads at once.
        """
        self.times: StageTimes = dict.fromkeys(STAGES, StageTime())
        self._on_image = on_image
        self._lock = threading.Lock()

    def image_done(self) -> None:
        """Says that an image has its record."""
        with self._lock:
            self._on_image()

    @contextmanager
    def measure(self, stage: str, images: int) -> Iterator[None]:
        """Counts the block's time and `images` for `stage`."""
        begin = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begin
        with self._lock:
            self.times[stage] += StageTime(images, elapsed)


# The images of a chunk through all stages: decoded once, tagged, detected, segmented, and one record for each.
#
# They are decoded once and stay in memory through the stages: tagged in large batches, detected in buckets of equal
# size, segmented where boxes were found. Which images share a batch depends on the images and the batch sizes alone.


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
