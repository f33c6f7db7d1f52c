"""From the shards of a finished run to one PAD file, with a list of the images that are not in it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from patch_aligned.annotate.run_folder import RunFolder
from patch_aligned.annotate.shards import Record, ShardError
from patch_aligned.record_files import write_records
from patch_aligned.whole_files import written_whole

SKIPPED_SUFFIX = ".skipped.jsonl"
SETTINGS_SUFFIX = ".settings.json"
_SHOWN = 5


class IncompleteRunError(ValueError):
    """Shards are missing or damaged; the message names them, their images, and the command that makes them."""


@dataclass(frozen=True)
class Merged:
    """What became of the images of a run.

    Attributes:
        output: the PAD file.
        images: of the manifest.
        written: records of the PAD file.
        regions: of the PAD file.
        counts: images by status.
        skipped: lists the images that are not in the PAD file, with their status and reason.
    """

    output: Path
    images: int
    written: int
    regions: int
    counts: dict[str, int]
    skipped: Path


def merge(
    run: RunFolder,
    output: Path,
    *,
    keep_all: bool = False,
    keep_candidates: bool = False,
    watch: Callable[[Iterator[Record]], Iterable[Record]] = iter,
) -> Merged:
    """Writes the records of all shards in the manifest's order, whole or not at all; one shard is held at a time.

    Beside `output` go `<output>.skipped.jsonl` and `<output>.settings.json`, a copy of the run's settings.

    Args:
        run: the output folder of `patch-aligned annotate`.
        output: a `.json`, `.jsonl`, `.json.gz`, `.jsonl.gz` or `.parquet` file.
        keep_all: take every image that could be read, not only those that ended `ok`: they have no regions. An image
            that could not be read has no size and is in no PAD file.
        keep_candidates: keep the boxes before NMS too.
        watch: passes the records on, one by one; it may show the progress.

    Raises:
        IncompleteRunError: shards are missing or damaged.
        RecordFileError: for an unknown suffix of `output`.
    """
    if missing := run.missing_shards():
        raise _incomplete(run, missing, [], "are not there")
    output.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    regions = 0
    skipped_path = output.with_name(output.name + SKIPPED_SUFFIX)

    def kept(skipped: IO[str]) -> Iterator[Record]:
        nonlocal regions
        for record in watch(_all_records(run)):
            counts[record["status"]] += 1
            if record["status"] == "ok" or (keep_all and record["size"] is not None):
                regions += len(record["labels"])
                yield {key: value for key, value in record.items() if keep_candidates or key != "candidates"}
            else:
                entry = {key: record.get(key) for key in ("image_id", "status", "reason")}
                skipped.write(json.dumps(entry, ensure_ascii=False) + "\n")

    with written_whole(skipped_path) as temporary, temporary.open("w", encoding="utf-8") as skipped:
        written = write_records(kept(skipped), output)
    with written_whole(output.with_name(output.name + SETTINGS_SUFFIX)) as temporary:
        temporary.write_bytes((run.path / "settings.json").read_bytes())
    return Merged(output, len(run.entries), written, regions, dict(sorted(counts.items())), skipped_path)


def _all_records(run: RunFolder) -> Iterator[Record]:
    """Records of all shards; damaged shards are gathered, so that the error at the end names all of them."""
    damaged: list[int] = []
    problems: list[str] = []
    for shard in range(run.num_shards):
        try:
            _, records = run.read_shard(shard)
        except ShardError as error:
            damaged.append(shard)
            problems.append(str(error))
            continue
        yield from records
    if damaged:
        raise _incomplete(run, damaged, problems, "are damaged")


def _incomplete(run: RunFolder, shards: list[int], problems: list[str], what: str) -> IncompleteRunError:
    images = sum(len(run.entries_of(shard)) for shard in shards)
    lines = []
    for shard in shards[:_SHOWN]:
        entries = run.entries_of(shard)
        lines.append(
            f"  {run.shard_path(shard)}: {len(entries)} images, {entries[0].image_id!r} to {entries[-1].image_id!r}"
        )
    if len(shards) > _SHOWN:
        lines.append(f"  and {len(shards) - _SHOWN} more: {', '.join(map(str, shards[_SHOWN:]))}")
    lines += [f"  {problem}" for problem in problems[:_SHOWN]]
    way_on = "`patch-aligned annotate` with the options of this run makes what is missing and leaves the rest"
    return IncompleteRunError(
        f"{run.path}: {len(shards)} of {run.num_shards} shards {what}, {images:,} of {len(run.entries):,} images; "
        f"expected all of the manifest. Nothing was written. {way_on}:\n" + "\n".join(lines)
    )
