"""Shards: the records of some thousand images in one file that appears whole or not at all.

The first line is a header, then comes one record a line, in the manifest's order. The same records give the same bytes:
nothing of when, where or how fast they were made is in them.

    {"shard": 0, "first": 0, "count": 2, "settings_sha256": "...", "counts": {"ok": 2}, "records_sha256": "..."}
    {"image_id": "a.jpg", "size": [640, 480], "caption": "", "labels": [...], "status": "ok", "reason": null, ...}
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patch_aligned.whole_files import written_whole

SHARDS_FOLDER = "shards"
_GZIP_LEVEL = 6
_LEFT_BEHIND_SECONDS = 3600  # of a temporary file's age; to write one takes seconds
_SUFFIX = ".jsonl.gz"

Record = dict[str, Any]
"""A PAD record with `status`, `reason`, `tags` and `candidates` beside its own keys."""


class ShardError(ValueError):
    """A shard that is missing, cut off or changed, or was made with other settings."""


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        shard: its number.
        first: row of its first image in the manifest.
        count: its images.
        settings_sha256: hash of the run's settings.json, so that shards of different runs can't be mixed up.
        counts: records by status, sorted by status.
        records_sha256: hash of the lines behind the header.
    """

    shard: int
    first: int
    count: int
    settings_sha256: str
    counts: dict[str, int]
    records_sha256: str


def shard_path(output: Path, shard: int) -> Path:
    """Where shard number `shard` of an output folder is or goes."""
    return output / SHARDS_FOLDER / f"{shard:05d}{_SUFFIX}"


def write_shard(path: Path, records: Sequence[Record], *, shard: int, first: int, settings_sha256: str) -> ShardHeader:
    """Writes a shard, whole or not at all.

    Raises:
        ValueError: a number that isn't finite, which JSON can't hold.
    """
    lines = b"".join(_line(record) for record in records)
    counts = Counter(record["status"] for record in records)
    header = ShardHeader(
        shard=shard,
        first=first,
        count=len(records),
        settings_sha256=settings_sha256,
        counts={status: counts[status] for status in sorted(counts)},
        records_sha256=hashlib.sha256(lines).hexdigest(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_bytes(gzip.compress(_line(asdict(header)) + lines, compresslevel=_GZIP_LEVEL, mtime=0))
    _remove_left_behind(path)
    return header


def read_header(path: Path) -> ShardHeader:
    """The header alone, without a look at the records.

    Raises:
        ShardError: no such file, or no shard.
    """
    try:
        with gzip.open(path, "rb") as file:
            return _header(file.readline(), path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    except FileNotFoundError:
        raise ShardError(f"{path}: found no such file; expected a shard. `patch-aligned annotate` makes it") from None


def read_shard(path: Path) -> tuple[ShardHeader, list[Record]]:
    """A shard's header and records, with the hash checked.

    Raises:
        ShardError: no such file, or one that isn't as it was written.
    """
    header = read_header(path)
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    lines = content[content.index(b"\n") + 1 :]
    if (found := hashlib.sha256(lines).hexdigest()) != header.records_sha256:
        raise _damaged(path, f"found records of sha256 {found}, expected {header.records_sha256}")
    return header, [json.loads(line) for line in lines.splitlines()]


def _remove_left_behind(path: Path) -> None:
    """Removes what processes left that were killed while they wrote; what is young may be another's, still at work."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - temporary.stat().st_mtime > _LEFT_BEHIND_SECONDS:
                temporary.unlink()


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _header(line: bytes, path: Path) -> ShardHeader:
    try:
        return ShardHeader(**json.loads(line))
    except (TypeError, ValueError) as error:
        raise _damaged(path, f"found no header in its first line ({error})") from error


def _damaged(path: Path, problem: str) -> ShardError:
    return ShardError(f"{path}: {problem}. Remove it and call `patch-aligned annotate` again, which makes it anew")
