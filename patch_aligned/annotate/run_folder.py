"""The output folder of an annotation run: its manifest, its settings, and its shards.

manifest.jsonl      the images, one line each
settings.json       what decides the records: models with the hashes of their weights, thresholds, versions
shards/00000.jsonl.gz ...
logs/               how long each shard took; nothing reads it
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from patch_aligned.annotate.manifest import ManifestEntry, manifest_bytes, read_manifest, write_manifest
from patch_aligned.annotate.shards import Record, ShardError, ShardHeader, read_header, read_shard, shard_path
from patch_aligned.whole_files import written_whole

_logger = logging.getLogger(__name__)

_NAMES_SHOWN = 5


class RunFolderError(ValueError):
    """A folder that isn't a run's, or is another run's."""


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
            RunFolderError: no run's folder, or a manifest that isn't the one of the settings.
            ManifestError: a broken manifest.
        """
        self.path = path
        settings_path, manifest_path = _settings_path(path), _manifest_path(path)
        for file in (settings_path, manifest_path):
            if not file.is_file():
                raise RunFolderError(
                    f"{file}: found no such file; expected the output folder of `patch-aligned annotate`"
                )
        content = settings_path.read_bytes()
        try:
            self.settings: dict[str, Any] = json.loads(content)
            self.shard_size: int = self.settings["shard_size"]
            expected = self.settings["manifest_sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{settings_path}: found no settings of a run ({error!r})") from error
        self.settings_sha256 = hashlib.sha256(content).hexdigest()
        self.entries: list[ManifestEntry] = read_manifest(manifest_path)
        found = hashlib.sha256(manifest_path.read_bytes()).hexdigest()
        if found != expected:
            raise RunFolderError(
                f"{manifest_path}: found sha256 {found}, expected {expected} as in settings.json. Was it edited? "
                "Annotate into another --output"
            )

    @classmethod
    def start(cls, path: Path, entries: list[ManifestEntry], settings: Mapping[str, Any], shard_size: int) -> RunFolder:
        """Makes the folder, or goes on with one that was made with the same images and settings.

        Several processes may do so at once: all of them write the same bytes. The run has begun once its settings are
        there: a manifest without them is what a call left that was killed in between, and is written anew.

        Raises:
            RunFolderError: names each setting that differs from the folder's.
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
            raise RunFolderError(f"{path}: {_difference_of_images(folder.entries, entries)}. {_ANOTHER}")
        differences = [
            f"{name}: the folder has {was!r}, this call {now!r}"
            for name, was, now in _differences(folder.settings, json.loads(json.dumps(wanted)))
        ]
        if differences:
            raise RunFolderError(
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


_ANOTHER = "Go on with the same ones, or name another --output"


def _settings_path(path: Path) -> Path:
    return path / "settings.json"


def _manifest_path(path: Path) -> Path:
    return path / "manifest.jsonl"


def _differences(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each leaf that differs."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted({*was, *now}):
            yield from _differences(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield name, was, now


def _difference_of_images(was: list[ManifestEntry], now: list[ManifestEntry]) -> str:
    old, new = ({entry.image_id: entry.caption for entry in entries} for entries in (was, now))
    if old.keys() != new.keys():
        parts = [
            f"{len(names)} {what} ({_listed(names)})"
            for names, what in (
                (new.keys() - old.keys(), "that the manifest lacks"),
                (old.keys() - new.keys(), "of the manifest that are gone"),
            )
            if names
        ]
        return f"found other images than the run began with: {' and '.join(parts)}"
    if changed := {name for name, caption in old.items() if caption != new[name]}:
        return f"found other captions than the run began with: of {len(changed)} images ({_listed(changed)})"
    return f"the manifest has the same {len(old)} images in another order"


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
