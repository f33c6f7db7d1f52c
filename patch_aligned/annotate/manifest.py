"""The manifest of a run: which images are annotated, in which order, and what is known of them before.

It is the first file of the output folder, `manifest.jsonl`, one line an image: {"image_id": "00000/1.jpg", "caption":
"..."}. Every id of it gets exactly one record in the shards, whatever happens to the image.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from patch_aligned.record_files import iter_records
from patch_aligned.whole_files import written_whole

_logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".ppm")
"""Files of a folder that are taken for images."""

_LIST_SUFFIXES = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
_CAPTION_KEYS = ("caption", "blip_caption")  # the second is that of LLaVA-Pretrain's blip_laion_cc_sbu_558k_meta.json
_ANSWERERS = ("gpt", "assistant")


class ManifestError(ValueError):
    """A folder or list without images, a path that leaves the image folder, or a broken manifest."""


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
        ManifestError: no images, a path that leaves the image folder, or a list without `image_folder`.
    """
    if images.is_dir():
        if image_folder is not None and image_folder.resolve() != images.resolve():
            raise ManifestError(
                f"--image_folder {image_folder}: found another folder than --images {images}; "
                "paths count from the folder of images itself, so leave --image_folder out"
            )
        return _listed(_paths_below(images), images), images
    if not images.name.lower().endswith(_LIST_SUFFIXES):
        raise ManifestError(
            f"--images {images}: found no folder; expected one, or a list ending in {', '.join(_LIST_SUFFIXES)}"
        )
    if image_folder is None or not image_folder.is_dir():
        raise ManifestError(
            f"--image_folder: found {image_folder or 'none'}, expected the folder that the paths of {images} count from"
        )
    named = _lines_of(images) if images.suffix.lower() == ".txt" else _images_of_records(images)
    return _listed(named, images), image_folder


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
        ManifestError: a line that is no entry, or an id that stands there twice.
        RecordFileError: a file that is missing or no JSON lines.
    """
    entries: dict[str, ManifestEntry] = {}
    for index, record in enumerate(iter_records(path)):
        image_id = record.get("image_id") if isinstance(record, Mapping) else None
        if not isinstance(image_id, str) or image_id in entries:
            raise ManifestError(
                f"{path}: record {index}, field 'image_id': found {image_id!r}, expected an id that stands there once. "
                "Was the file edited? `patch-aligned annotate` writes it anew into another --output"
            )
        entries[image_id] = ManifestEntry(image_id, record.get("caption", ""))
    return list(entries.values())


def _listed(named: Iterable[tuple[str, str, str]], source: Path) -> list[ManifestEntry]:
    """Entries of (place, path, caption), each path checked and once."""
    entries: dict[str, ManifestEntry] = {}
    repeated = 0
    for place, name, caption in named:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or not _is_utf8(name):
            raise ManifestError(
                f"{place}: found image {name!r}, expected a path below the image folder, without '..', in UTF-8"
            )
        image_id = str(path)
        repeated += image_id in entries
        entries.setdefault(image_id, ManifestEntry(image_id, caption))
    if not entries:
        raise ManifestError(f"--images {source}: found no images; expected at least one ({', '.join(IMAGE_SUFFIXES)})")
    if repeated:
        _logger.info("%s names %d images again; each is annotated once", source, repeated)
    return list(entries.values())


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)  # what Python makes of other bytes


def _paths_below(folder: Path) -> Iterator[tuple[str, str, str]]:
    def refuse(error: OSError) -> None:  # os.walk would pass over the folder in silence
        raise ManifestError(
            f"{error.filename}: found a folder that cannot be read ({error.strerror}); expected all folders below "
            f"--images {folder} to be. Correct its permissions or the link, or give a list of images"
        )

    names, others = [], 0
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders.sort()
        for link in (Path(parent) / name for name in folders):
            if link.is_symlink() and link.resolve() in (above := Path(parent).resolve(), *above.parents):
                raise ManifestError(f"{link}: found a link that leads back to {link.resolve()}; remove it")
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES):
                names.append((Path(parent) / name).relative_to(folder).as_posix())
            else:
                others += 1
    if others:
        _logger.info("%s: %d files don't have the suffix of an image and are left alone", folder, others)
    for name in sorted(names):
        yield str(folder), name, ""


def _lines_of(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a path may hold what else ends a line
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: found text that is not UTF-8 ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip(), ""


def _images_of_records(path: Path) -> Iterator[tuple[str, str, str]]:
    """Images of records; a record of text alone, as LLaVA's JSON has them, names none."""
    for index, record in enumerate(iter_records(path)):
        place = f"{path}: record {index}"
        if not isinstance(record, Mapping):
            raise ManifestError(
                f"{place}: found {type(record).__name__}, expected an object with 'image' or 'image_id'"
            )
        images = record.get("image_id", record.get("image"))
        if images is None and "conversations" in record:
            continue
        caption = _caption_of(record)
        if not _is_utf8(caption):
            raise ManifestError(f"{place}: found caption {caption!r}, expected text in UTF-8. Correct or remove it")
        for image in images if isinstance(images, list) else [images]:
            if not isinstance(image, str):
                raise ManifestError(f"{place}, field 'image': found {image!r}, expected a path below the image folder")
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
