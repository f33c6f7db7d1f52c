"""The output folder of an annotation run: its manifest, its settings, and its shards.

manifest.jsonl      the images, one line each
settings.json       what decides the records: models with the hashes of their weights, thresholds, versions
shards/00000.jsonl.gz ...
logs/               how long each shard took; nothing reads it
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from PIL import Image

from patch_aligned.files import refuse_inputs, written_whole
from patch_aligned.pad import SETTINGS_SUFFIX, SKIPPED_SUFFIX, iter_records, write_records

# The manifest of a run: which images are annotated, in which order, and what is known of them before.
#
# It is the first file of the output folder, `manifest.jsonl`, one line an image: {"image_id": "00000/1.jpg", "caption":
# "..."}. Every id of it gets exactly one record in the shards, whatever happens to the image.

_logger = logging.getLogger(__name__)

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS))
"""Files of a folder that are taken for images: those of formats that Pillow reads on this machine."""

_LIST_SUFFIXES = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
_CAPTION_KEYS = ("caption", "blip_caption")  # the second is that of LLaVA-Pretrain's blip_laion_cc_sbu_558k_meta.json
_ANSWERERS = ("gpt", "assistant")


@dataclass(frozen=True)
class ManifestEntry:
    """One image to annotate.

    Attributes:
        image_id: its path below the image folder, with forward slashes; joins the record with the training JSON.
        caption: its caption, empty where none is known.
    """

    image_id: str
    caption: str = ""


def list_images(images: Path, image_folder: Path | None = None) -> tuple[list[ManifestEntry], Path]:
    """The images of a folder or of a list, each once.

    Args:
        images: a folder, searched to the bottom and sorted by path; or a list, in its order: `.txt` with one path a
            line, or records (JSON, JSON lines, either gzipped, Parquet) with `image_id` or `image` and perhaps a
            caption, such as LLaVA's training JSON, whose first answer is taken for the caption.
        image_folder: what a list's paths count from. A folder's own paths count from itself.

    Returns:
        The entries and the image folder. Images that a list names again keep their first caption.

    Raises:
        ValueError: no images, a path that leaves the image folder, or a list without `image_folder`.
    """
    if images.is_dir():
        if image_folder is not None and image_folder.resolve() != images.resolve():
            raise ValueError(
                f"--image_folder {image_folder}: found another folder than --images {images}; "
                "paths count from the folder of images itself, so leave --image_folder out"
            )
        return _listed_images(_paths_below(images), images), images
    if not images.name.lower().endswith(_LIST_SUFFIXES):
        raise ValueError(
            f"--images {images}: found no folder; expected one, or a list ending in {', '.join(_LIST_SUFFIXES)}"
        )
    if image_folder is None or not image_folder.is_dir():
        raise ValueError(
            f"--image_folder: found {image_folder or 'none'}, expected the folder that the paths of {images} count from"
        )
    named = _lines_of(images) if images.suffix.lower() == ".txt" else _images_of_records(images)
    return _listed_images(named, images), image_folder


def write_manifest(entries: Iterable[ManifestEntry], path: Path) -> None:
    """Writes `manifest.jsonl`, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_bytes(manifest_bytes(entries))


def manifest_bytes(entries: Iterable[ManifestEntry]) -> bytes:
    """The file's content: equal images give equal bytes."""
    return "".join(
        json.dumps(
            {"image_id": entry.image_id} | ({"caption": entry.caption} if entry.caption else {}), ensure_ascii=False
        )
        + "\n"
        for entry in entries
    ).encode("utf-8")


def read_manifest(path: Path) -> list[ManifestEntry]:
    """The entries of `manifest.jsonl` in order.

    Raises:
        ValueError: a line that is no entry, or an id that stands there twice.
        RecordFileError: a file that is missing or no JSON lines.
    """
    entries: dict[str, ManifestEntry] = {}
    for index, record in enumerate(iter_records(path)):
        image_id = record.get("image_id") if isinstance(record, Mapping) else None
        if not isinstance(image_id, str) or image_id in entries:
            raise ValueError(
                f"{path}: record {index}, field 'image_id': found {image_id!r}, expected an id that stands there once. "
                "Was the file edited? `patch-aligned annotate` writes it anew into another --output"
            )
        entries[image_id] = ManifestEntry(image_id, record.get("caption", ""))
    return list(entries.values())


def _listed_images(named: Iterable[tuple[str, str, str]], source: Path) -> list[ManifestEntry]:
    """Entries of (place, path, caption), each path checked and once."""
    entries: dict[str, ManifestEntry] = {}
    repeated = 0
    for place, name, caption in named:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or not _is_utf8(name):
            raise ValueError(
                f"{place}: found image {name!r}, expected a path below the image folder, without '..', in UTF-8"
            )
        image_id = str(path)
        repeated += image_id in entries
        entries.setdefault(image_id, ManifestEntry(image_id, caption))
    if not entries:
        raise ValueError(f"--images {source}: found no images; expected at least one ({', '.join(IMAGE_SUFFIXES)})")
    if repeated:
        _logger.info("%s names %d images again; each is annotated once", source, repeated)
    return list(entries.values())


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)  # what Python makes of other bytes


def _paths_below(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Images below a folder, sorted by path. Links are followed; what has no image's suffix is counted."""
    left_alone: Counter[str] = Counter()
    names = []
    for path in _files_below(folder, (folder.resolve(),)):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            left_alone[path.suffix.lower() or "no suffix"] += 1
        elif path.exists() and not path.is_file():
            left_alone["pipe or device"] += 1
        else:
            names.append(path.relative_to(folder).as_posix())
    if left_alone:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_alone.most_common(8))
        _logger.warning("%s: %d files are no images by their suffix and are left alone: %s", folder,
                        left_alone.total(), kinds)  # fmt: skip
    for name in sorted(names):
        yield str(folder), name, ""


def _files_below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """All that is no folder below `folder`; `above` are the real paths of it and of those it was reached through."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            path = Path(entry.path)
            if not entry.is_dir():
                yield path
                continue
            place = path.resolve() if entry.is_symlink() else above[-1] / entry.name
            if place in above:
                raise ValueError(f"{path}: found a link that leads back to {place}; remove it")
            yield from _files_below(path, (*above, place))
    except OSError as error:
        raise ValueError(
            f"{error.filename}: found a folder or link that cannot be read ({error.strerror}); expected all folders "
            "below --images to be. Correct its permissions or the link, or give a list of images"
        ) from error


def _lines_of(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a path may hold what else ends a line
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found text that is not UTF-8 ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip(), ""


def _images_of_records(path: Path) -> Iterator[tuple[str, str, str]]:
    """Images of records; a record of text alone, as LLaVA's JSON has them, names none."""
    for index, record in enumerate(iter_records(path)):
        place = f"{path}: record {index}"
        if not isinstance(record, Mapping):
            raise ValueError(f"{place}: found {type(record).__name__}, expected an object with 'image' or 'image_id'")
        images = record.get("image_id", record.get("image"))
        if images is None and "conversations" in record:
            continue
        caption = _caption_of(record)
        if not _is_utf8(caption):
            raise ValueError(f"{place}: found caption {caption!r}, expected text in UTF-8. Correct or remove it")
        for image in images if isinstance(images, list) else [images]:
            if not isinstance(image, str):
                raise ValueError(f"{place}, field 'image': found {image!r}, expected a path below the image folder")
            yield place, image, caption


def _caption_of(record: Mapping[str, Any]) -> str:
    for key in _CAPTION_KEYS:
        if isinstance(record.get(key), str):
            return record[key]
    turns = record.get("conversations")
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, Mapping) and turn.get("from") in _ANSWERERS and isinstance(turn.get("value"), str):
            return turn["value"].strip()
    return ""


# Shards: the records of some thousand images in one file that appears whole or not at all.
#
# The first line is a header, then comes one record a line, in the manifest's order. The same records give the same
# bytes: nothing of when, where or how fast they were made is in them.
#
#     {"shard": 0, "first": 0, "count": 2, "settings_sha256": "...", "counts": {"ok": 2}, "records_sha256": "..."}
#     {"image_id": "a.jpg", "size": [640, 480], "caption": "", "labels": [...], "status": "ok", "reason": null, ...}

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


_NAMES_SHOWN = 5


class RunFolder:
    """An output folder, opened.

    Attributes:
        path: the folder.
        entries: the manifest's, in order.
        settings: what settings.json says.
        settings_sha256: its hash, which every shard carries.
    """

    def __init__(self, path: Path) -> None:
        """Reads a run's manifest and settings.

        Raises:
            ValueError: no run's folder, or a manifest that isn't the one of the settings; or a broken manifest.
        """
        self.path = path
        settings_path, manifest_path = _settings_path(path), _manifest_path(path)
        for file in (settings_path, manifest_path):
            if not file.is_file():
                raise ValueError(f"{file}: found no such file; expected the output folder of `patch-aligned annotate`")
        content = settings_path.read_bytes()
        try:
            self.settings: dict[str, Any] = json.loads(content)
            self.shard_size: int = self.settings["shard_size"]
            expected = self.settings["manifest_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{settings_path}: found no settings of a run ({error!r})") from error
        self.settings_sha256 = hashlib.sha256(content).hexdigest()
        self.entries: list[ManifestEntry] = read_manifest(manifest_path)
        found = hashlib.sha256(manifest_path.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"{manifest_path}: found sha256 {found}, expected {expected} as in settings.json. Was it edited? "
                "Annotate into another --output"
            )

    @classmethod
    def start(cls, path: Path, entries: list[ManifestEntry], settings: Mapping[str, Any], shard_size: int) -> RunFolder:
        """Makes the folder, or goes on with one that was made with the same images and settings.

        Several processes may do so at once: all of them write the same bytes. The run has begun once its settings are
        there: a manifest without them is what a call left that was killed in between, and is written anew.

        Raises:
            ValueError: names each setting that differs from the folder's.
        """
        content = manifest_bytes(entries)
        wanted = {"shard_size": shard_size, "manifest_sha256": hashlib.sha256(content).hexdigest(), **settings}
        path.mkdir(parents=True, exist_ok=True)
        if not _settings_path(path).exists():
            write_manifest(entries, _manifest_path(path))
            with written_whole(_settings_path(path)) as temporary:
                temporary.write_text(json.dumps(wanted, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        folder = cls(path)
        if folder.entries != entries:
            raise ValueError(f"{path}: {_difference_of_images(folder.entries, entries)}. {_ANOTHER}")
        differences = [
            f"{name}: the folder has {was!r}, this call {now!r}"
            for name, was, now in _differences(folder.settings, json.loads(json.dumps(wanted)))
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

    def first_of(self, shard: int) -> int:
        """Row of the shard's first image in the manifest."""
        return shard * self.shard_size

    def entries_of(self, shard: int) -> list[ManifestEntry]:
        """The images of a shard."""
        return self.entries[self.first_of(shard) : self.first_of(shard + 1)]

    def shard_path(self, shard: int) -> Path:
        """Its file, which is there if it is done."""
        return shard_path(self.path, shard)

    def files(self) -> list[Path]:
        """What the run consists of, there or not."""
        shards = map(self.shard_path, range(self.num_shards))
        return [_settings_path(self.path), _manifest_path(self.path), *shards]

    def read_shard(self, shard: int) -> tuple[ShardHeader, list[Record]]:
        """A finished shard: its header and one record for each of its images, in order.

        Raises:
            ShardError: it is missing, not as it was written, of other settings, or of other images.
        """
        path = self.shard_path(shard)
        header, records = read_shard(path)
        if header.settings_sha256 != self.settings_sha256:
            raise ShardError(
                f"{path}, field 'settings_sha256': found {header.settings_sha256}, expected {self.settings_sha256} of "
                f"{_settings_path(self.path)}. It belongs to another run; remove it and annotate again"
            )
        expected = [entry.image_id for entry in self.entries_of(shard)]
        if [record.get("image_id") for record in records] != expected or header.shard != shard:
            raise ShardError(
                f"{path}: found other images than those of the manifest's rows {self.first_of(shard)} to "
                f"{self.first_of(shard) + len(expected) - 1}. Remove it and annotate again"
            )
        return header, records

    def is_done(self, shard: int) -> bool:
        """Whether the shard is there and sound."""
        try:
            self.read_shard(shard)
        except ShardError as error:
            if self.shard_path(shard).exists():
                _logger.warning("Made anew: %s", error)
            return False
        return True

    def is_left(self, shard: int, retry: Collection[str] = ()) -> bool:
        """Whether the shard is still to be done, or has records of the statuses that are to be tried again."""
        return not self.is_done(shard) or any(status in retry for status in read_header(self.shard_path(shard)).counts)

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that aren't there. Those that are there aren't read."""
        return [shard for shard in range(self.num_shards) if not self.shard_path(shard).is_file()]

    def iter_records(self) -> Iterator[Record]:
        """All records in the manifest's order; one shard is held at a time.

        Raises:
            ShardError: see `read_shard`.
        """
        for shard in range(self.num_shards):
            yield from self.read_shard(shard)[1]


_ORIGINS = ("model", "revision", "checkpoint")
"""Settings that say where a model's files are from; what is in them decides."""

_ANOTHER = "Go on with the same ones, or name another --output"


def _settings_path(path: Path) -> Path:
    return path / "settings.json"


def _manifest_path(path: Path) -> Path:
    return path / "manifest.jsonl"


def _differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each leaf that differs."""
    if isinstance(was, dict) and isinstance(now, dict):
        origins = _ORIGINS if any(key.endswith("sha256") for key in was) else ()
        for key in sorted({*was, *now} - {*origins}):
            yield from _differences(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield name, was, now


def _difference_of_images(was: list[ManifestEntry], now: list[ManifestEntry]) -> str:
    old, new = ({entry.image_id: entry.caption for entry in entries} for entries in (was, now))
    if old.keys() != new.keys():
        parts = [
            f"{len(names)} {what} ({_first_of(names)})"
            for names, what in (
                (new.keys() - old.keys(), "that the manifest lacks"),
                (old.keys() - new.keys(), "of the manifest that are gone"),
            )
            if names
        ]
        return f"found other images than the run began with: {' and '.join(parts)}"
    if changed := {name for name, caption in old.items() if caption != new[name]}:
        return f"found other captions than the run began with: of {len(changed)} images ({_first_of(changed)})"
    return f"the manifest has the same {len(old)} images in another order"


def _first_of(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


# From the shards of a finished run to one PAD file, with a list of the images that are not in it.


_SHOWN = 5


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
        ValueError: shards are missing or damaged, or `output` is a file of the run.
        RecordFileError: for an unknown suffix of `output`.
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
    way_on = "`patch-aligned annotate` with the options of this run makes what is missing and leaves the rest"
    return ValueError(
        f"{run.path}: {len(shards)} of {run.num_shards} shards {what}, {images:,} of {len(run.entries):,} images; "
        f"expected all of the manifest. Nothing was written. {way_on}:\n" + "\n".join(lines)
    )
