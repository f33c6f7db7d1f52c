"""The output folder of an annotation run: its manifest, its settings, and its shards.

manifest.jsonl      the images, one a line: {"image_id": "00000/1.jpg", "caption": "..."}
settings.json       what determines the records: models with the hashes of their weights, thresholds, versions
shards/00000.jsonl.gz ...
                    a header, then one record a line, in the manifest's order
logs/               how long each shard took; nothing reads it

Every image of the manifest gets exactly one record, whatever happens to it. Files are written atomically, and the same
records give the same bytes: nothing of when, where or how fast they were made is in them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from patch_aligned.annotate.manifest import ManifestEntry
from patch_aligned.files import refuse_inputs, written_whole
from patch_aligned.record_files import SETTINGS_SUFFIX, SKIPPED_SUFFIX, named, with_progress, write_records

_logger = logging.getLogger(__name__)

_GZIP_LEVEL = 6
_LEFT_BEHIND_SECONDS = 3600  # age of a temporary file; writing one takes seconds
_SHOWN = 5
_ORIGINS = ("model", "revision", "checkpoint")  # settings that say where files are from; their content decides
_ANOTHER = "Use the same ones, or name another --output"

Record = dict[str, Any]
"""A PAD record with `status`, `reason`, `tags` and `candidates` beside its own keys."""


class ShardError(ValueError):
    """A shard that is missing, damaged, or of another run."""


@dataclass(frozen=True)
class ShardHeader:
    """The first line of a shard."""

    shard: int
    first: int  # row of its first image in the manifest
    count: int  # images
    settings_sha256: str  # of the run's settings.json, so that shards of different runs are not mixed up
    counts: dict[str, int]  # records by status, sorted by status
    records_sha256: str  # of the other lines


class RunFolder:
    """An output folder, opened. `entries` are the manifest's; every shard carries `settings_sha256`."""

    def __init__(self, path: Path) -> None:
        """Read manifest and settings; `ValueError` if it is no run's folder, or they do not belong together."""
        self.path = path
        self.settings_path, self.manifest_path = path / "settings.json", path / "manifest.jsonl"
        for file in (self.settings_path, self.manifest_path):
            if not file.is_file():
                raise ValueError(f"{file}: found no such file; expected the output folder of `patch-aligned annotate`")
        content, manifest = self.settings_path.read_bytes(), self.manifest_path.read_bytes()
        try:
            self.settings: dict[str, Any] = json.loads(content)
            self.shard_size: int = self.settings["shard_size"]
            expected = self.settings["manifest_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.settings_path}: found no settings of a run ({error!r})") from error
        if (found := hashlib.sha256(manifest).hexdigest()) != expected:
            raise ValueError(
                f"{self.manifest_path}: found sha256 {found}, expected {expected} as in settings.json. Was it edited? "
                "Annotate into another --output"
            )
        self.settings_sha256 = hashlib.sha256(content).hexdigest()
        self.entries = [ManifestEntry(**json.loads(line)) for line in manifest.splitlines()]

    @classmethod
    def start(cls, path: Path, entries: list[ManifestEntry], settings: Mapping[str, Any], shard_size: int) -> RunFolder:
        """Create the folder, or open one that was made with the same images and settings.

        Several processes may do so at once: all of them write the same bytes. A run has begun once its settings are
        there; a manifest without them is left from a call that was killed in between, and is overwritten. `ValueError`
        names each setting that differs from the folder's.
        """
        manifest = b"".join(
            _line({"image_id": entry.image_id} | ({"caption": entry.caption} if entry.caption else {}))
            for entry in entries
        )
        wanted = {"shard_size": shard_size, "manifest_sha256": hashlib.sha256(manifest).hexdigest(), **settings}
        text = json.dumps(wanted, indent=1, sort_keys=True) + "\n"
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "settings.json").exists():
            for name, content in (("manifest.jsonl", manifest), ("settings.json", text.encode("utf-8"))):
                with written_whole(path / name) as temporary:
                    temporary.write_bytes(content)
        folder = cls(path)
        if folder.entries != entries:
            raise ValueError(f"{path}: {_difference_of_images(folder.entries, entries)}. {_ANOTHER}")
        differences = [
            f"{name}: the folder has {was!r}, this call {now!r}"
            for name, was, now in _differences(folder.settings, json.loads(text))
        ]
        if differences:
            raise ValueError(
                f"{path}: was begun with other settings, and one data set has one.\n  "
                + "\n  ".join(differences)
                + f"\n{_ANOTHER}"
            )
        return folder

    @property
    def num_shards(self) -> int:
        """Shards of the whole run, done or not."""
        return -(-len(self.entries) // self.shard_size)

    def entries_of(self, shard: int) -> list[ManifestEntry]:
        """Return the images of a shard."""
        return self.entries[shard * self.shard_size : (shard + 1) * self.shard_size]

    def shard_path(self, shard: int) -> Path:
        """Return a shard's file, which exists if it is done."""
        return self.path / "shards" / f"{shard:05d}.jsonl.gz"

    def files(self) -> list[Path]:
        """Return all files of the run, existing or not."""
        return [self.settings_path, self.manifest_path, *map(self.shard_path, range(self.num_shards))]

    def write_shard(self, shard: int, records: Sequence[Record]) -> ShardHeader:
        """Write a shard atomically; `ValueError` for a number that is not finite, which JSON cannot express."""
        lines = b"".join(map(_line, records))
        counts = Counter(record["status"] for record in records)
        header = ShardHeader(
            shard=shard,
            first=shard * self.shard_size,
            count=len(records),
            settings_sha256=self.settings_sha256,
            counts=dict(sorted(counts.items())),
            records_sha256=hashlib.sha256(lines).hexdigest(),
        )
        path = self.shard_path(shard)
        path.parent.mkdir(exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_bytes(gzip.compress(_line(asdict(header)) + lines, compresslevel=_GZIP_LEVEL, mtime=0))
        # Remove what killed processes left; a younger file may belong to another process that is still writing.
        for left_behind in path.parent.glob(f".{path.name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left_behind.stat().st_mtime > _LEFT_BEHIND_SECONDS:
                    left_behind.unlink()
        return header

    def read_header(self, shard: int) -> ShardHeader:
        """Read the header alone; `ShardError` if the file is missing or no shard."""
        path = self.shard_path(shard)
        with _shard_errors(path), gzip.open(path, "rb") as file:
            return ShardHeader(**json.loads(file.readline()))

    def read_shard(self, shard: int) -> tuple[ShardHeader, list[Record]]:
        """Read the header and one record for each image, in order.

        `ShardError`: the shard is missing, damaged, of other settings, or of other images.
        """
        path = self.shard_path(shard)
        with _shard_errors(path):
            first, lines = gzip.decompress(path.read_bytes()).split(b"\n", 1)
            header = ShardHeader(**json.loads(first))
            if (found := hashlib.sha256(lines).hexdigest()) != header.records_sha256:
                raise ValueError(f"found records of sha256 {found}, expected {header.records_sha256}")
            records: list[Record] = [json.loads(line) for line in lines.splitlines()]
        if header.settings_sha256 != self.settings_sha256:
            raise ShardError(
                f"{path}, field 'settings_sha256': found {header.settings_sha256}, expected {self.settings_sha256} of "
                f"{self.settings_path}. It belongs to another run; remove it and annotate again"
            )
        expected = [entry.image_id for entry in self.entries_of(shard)]
        if [record.get("image_id") for record in records] != expected or header.shard != shard:
            rows = f"{shard * self.shard_size} to {shard * self.shard_size + len(expected) - 1}"
            raise ShardError(
                f"{path}: found other images than those of the manifest's rows {rows}. Remove it and annotate again"
            )
        return header, records

    def finished_records(self, shard: int) -> list[Record] | None:
        """Return a shard's records, or None where it is missing or damaged and so has to be made."""
        try:
            return self.read_shard(shard)[1]
        except ShardError as error:
            if self.shard_path(shard).exists():
                _logger.warning("Made again: %s", error)
            return None

    def is_left(self, shard: int, retry: Collection[str] = ()) -> bool:
        """Whether the shard has to be made, or has records of the statuses that are to be tried again."""
        records = self.finished_records(shard)
        return records is None or any(record["status"] in retry for record in records)

    def missing_shards(self) -> list[int]:
        """Return the shards without a file. Existing files are not read."""
        return [shard for shard in range(self.num_shards) if not self.shard_path(shard).is_file()]


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


@contextmanager
def _shard_errors(path: Path) -> Iterator[None]:
    """Name the shard in whatever is raised while it is read."""
    again = "`patch-aligned annotate` makes it again"
    try:
        yield
    except FileNotFoundError:
        raise ShardError(f"{path}: found no such file, expected a shard; {again}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, TypeError, ValueError) as error:
        raise ShardError(f"{path}: found a damaged shard ({error}). Remove it; {again}") from error


def _differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield name, old and new value of each leaf that differs."""
    if isinstance(was, dict) and isinstance(now, dict):
        origins = _ORIGINS if any(key.endswith("sha256") for key in was) else ()
        for key in sorted({*was, *now} - {*origins}):
            yield from _differences(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield name, was, now


def _difference_of_images(was: list[ManifestEntry], now: list[ManifestEntry]) -> str:
    old, new = dict(was), dict(now)
    if old.keys() != new.keys():
        parts = [
            f"{len(names)} {what} ({named(sorted(names))})"
            for names, what in (
                (new.keys() - old.keys(), "that the manifest lacks"),
                (old.keys() - new.keys(), "of the manifest that are gone"),
            )
            if names
        ]
        return f"found other images than the run began with: {' and '.join(parts)}"
    if changed := {name for name, caption in old.items() if caption != new[name]}:
        return f"found other captions than the run began with: of {len(changed)} images ({named(sorted(changed))})"
    return f"the manifest has the same {len(old)} images in another order"


# From the shards of a finished run to one PAD file, with a list of the images that are not in it.


class Merged(NamedTuple):
    """What became of the images of a run."""

    images: int  # of the manifest
    written: int  # records of the PAD file
    regions: int  # of the PAD file
    counts: dict[str, int]  # images by status
    skipped: Path  # lists the images that are not in the PAD file, with their status and reason


def merge(
    run: RunFolder,
    output: Path,
    *,
    keep_all: bool = False,
    keep_candidates: bool = False,
    change: Callable[[Iterable[Record]], Iterable[Record]] = iter,
) -> Merged:
    """Write the records of all shards to one PAD file, atomically and in the manifest's order.

    One shard is in memory at a time. `<output>.skipped.jsonl` and `<output>.settings.json`, a copy of the run's
    settings, are written beside `output`. `keep_all` takes every image that could be read, also without regions; one
    that could not be read has no size and is in no PAD file. `change` may alter the records.
    """
    refuse_inputs(output, run.files())
    if missing := run.missing_shards():
        raise _incomplete(run, missing, [], "are not there")
    output.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    regions = 0
    skipped_path = output.with_name(output.name + SKIPPED_SUFFIX)

    def kept(skipped: IO[str]) -> Iterator[Record]:
        nonlocal regions
        for record in with_progress(change(_all_records(run)), "Merging"):
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
        temporary.write_bytes(run.settings_path.read_bytes())
    return Merged(len(run.entries), written, regions, dict(sorted(counts.items())), skipped_path)


def _all_records(run: RunFolder) -> Iterator[Record]:
    """Yield the records of all shards; one error at the end names all damaged shards."""
    problems: dict[int, str] = {}
    for shard in range(run.num_shards):
        try:
            _, records = run.read_shard(shard)
        except ShardError as error:
            problems[shard] = str(error)
            continue
        yield from records
    if problems:
        raise _incomplete(run, list(problems), list(problems.values()), "are damaged")


def _incomplete(run: RunFolder, shards: list[int], problems: list[str], what: str) -> ValueError:
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
    return ValueError(
        f"{run.path}: {len(shards)} of {run.num_shards} shards {what}, {images:,} of {len(run.entries):,} images; "
        "expected all of the manifest. Nothing was written. `patch-aligned annotate` with the options of this run "
        "makes the missing shards and leaves the others:\n" + "\n".join(lines)
    )
