"""`process_shard`: all that is done to a shard's images, and the one function that every engine calls.

A shard is worked on in chunks of some hundred images. Worker threads decode the next chunk while the models are busy
with this one. Which images share a batch depends on the manifest and the batch sizes alone, so a shard's bytes don't
depend on who makes it, when, or how often it was interrupted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from patch_aligned.annotate.annotate_images import Workload, annotate_images
from patch_aligned.annotate.decoding import NO_SUCH_FILE, StorageError
from patch_aligned.annotate.manifest import ManifestEntry
from patch_aligned.annotate.run_folder import RunFolder
from patch_aligned.annotate.shards import Record, ShardHeader, write_shard
from patch_aligned.annotate.stage_clock import StageClock
from patch_aligned.annotate.stages import Stages

FAILED_STATUSES = ("unreadable", "out_of_memory", "non_finite")
"""Statuses of images that something went wrong with. The others say that there was nothing to annotate."""

STATUSES = ("ok", "no_tags", "no_boxes", "no_masks", "skipped", *FAILED_STATUSES)
"""All that a record may have."""


class FailedImageError(ValueError):
    """An image that failed, where `on_error` is `fail`."""


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
        FailedImageError: names the images that failed, where `on_error` is `fail`. Nothing is written then.
        StorageError: the images can't be had now. Nothing is written either.
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
    """A picture that isn't there is that picture's fault; if none of a shard is, the folder's."""
    if all(record["reason"] == NO_SUCH_FILE for record in records):
        raise StorageError(
            f"{image_folder}: found none of the {len(records):,} images of a shard, such as "
            f"{records[0]['image_id']!r}; expected them below this folder. Nothing was recorded of them. Correct "
            "--image_folder, or mount the disk, and run the same command again, with --retry unreadable if earlier "
            "shards lack images too. If these are gone for good, add --allow_missing"
        )


def _refuse_failed(records: Sequence[Record]) -> None:
    failed = [record for record in records if record["status"] in FAILED_STATUSES]
    if failed:
        listed = "; ".join(f"{record['image_id']}: {record['status']} ({record['reason']})" for record in failed[:5])
        raise FailedImageError(
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
