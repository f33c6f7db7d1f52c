"""Lists the images of an annotation run: of a folder, of a list of paths, or of a training file with captions."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from patch_aligned.record_files import first_answer, is_text, iter_records

_logger = logging.getLogger(__name__)

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS))
"""Suffixes of the files of a folder that count as images: formats that Pillow reads on this machine."""

_LIST_SUFFIXES = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
_CAPTION_KEYS = ("caption", "blip_caption")  # the second is that of LLaVA-Pretrain's blip_laion_cc_sbu_558k_meta.json


class ManifestEntry(NamedTuple):
    """One image to annotate."""

    image_id: str  # path below the image folder, with forward slashes; joins the record with the training JSON
    caption: str = ""  # empty where none is known


def list_images(images: Path, image_folder: Path | None = None) -> tuple[list[ManifestEntry], Path]:
    """List the images of a folder or of a list, each once.

    Args:
        images: a folder, searched recursively and sorted by path; or a list, in its order: `.txt` with one path a
            line, or records (JSON, JSON lines, either gzipped, Parquet) with `image_id` or `image` and perhaps a
            caption, such as LLaVA's training JSON, whose first answer is the caption.
        image_folder: folder that a list's paths start from. Those of a folder start from itself.

    Returns:
        The entries and the image folder. An image that a list names again keeps its first caption.

    Raises:
        ValueError: no images, a path that leaves the image folder, or a list without `image_folder`.
    """
    if images.is_dir():
        if image_folder is not None and image_folder.resolve() != images.resolve():
            raise ValueError(
                f"--image_folder {image_folder}: found another folder than --images {images}, which paths start from; "
                "leave --image_folder out"
            )
        named, image_folder = _paths_below(images), images
    elif not images.name.lower().endswith(_LIST_SUFFIXES):
        raise ValueError(
            f"--images {images}: found no folder; expected one, or a list ending in {', '.join(_LIST_SUFFIXES)}"
        )
    elif image_folder is None or not image_folder.is_dir():
        raise ValueError(
            f"--image_folder: found {image_folder or 'none'}, expected the folder that the paths of {images} start from"
        )
    else:
        named = _lines_of(images) if images.suffix.lower() == ".txt" else _images_of_records(images)
    entries: dict[str, ManifestEntry] = {}
    repeated = 0
    for place, name, caption in named:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or not is_text(name):
            raise ValueError(
                f"{place}: found image {name!r}, expected a path below the image folder, without '..', in UTF-8"
            )
        image_id = str(path)
        repeated += image_id in entries
        entries.setdefault(image_id, ManifestEntry(image_id, caption))
    if not entries:
        raise ValueError(f"--images {images}: found no images; expected at least one ({', '.join(IMAGE_SUFFIXES)})")
    if repeated:
        _logger.info("%s names %d images again; each is annotated once", images, repeated)
    return list(entries.values()), image_folder


def _paths_below(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (place, path, caption) of the images below a folder, sorted by path. Other files are counted."""
    ignored: Counter[str] = Counter()
    names = []
    for path in _files_below(folder, (folder.resolve(),)):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            ignored[path.suffix.lower() or "no suffix"] += 1
        elif path.exists() and not path.is_file():
            ignored["pipe or device"] += 1
        else:
            names.append(path.relative_to(folder).as_posix())
    if ignored:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in ignored.most_common(8))
        _logger.warning(
            "%s: %d files are no images by their suffix and are ignored: %s", folder, ignored.total(), kinds
        )
    for name in sorted(names):
        yield str(folder), name, ""


def _files_below(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the files below `folder`, following links; `above` are the real paths from the top down to it."""
    try:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = Path(entry.path)
            if not entry.is_dir():
                yield path
                continue
            real_path = path.resolve() if entry.is_symlink() else above[-1] / entry.name
            if real_path in above:
                raise ValueError(f"{path}: found a link that leads back to {real_path}; remove it")
            yield from _files_below(path, (*above, real_path))
    except OSError as error:
        raise ValueError(
            f"{error.filename}: found a folder or link that cannot be read ({error.strerror}); expected all folders "
            "below --images to be. Correct its permissions or the link, or give a list of images"
        ) from error


def _lines_of(path: Path) -> Iterator[tuple[str, str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a path may contain other line separators
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: found text that is not UTF-8 ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip(), ""


def _images_of_records(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the images of records; a record of text alone, as in LLaVA's JSON, has none."""
    for index, record in enumerate(iter_records(path)):
        place = f"{path}: record {index}"
        if not isinstance(record, Mapping):
            raise ValueError(f"{place}: found {type(record).__name__}, expected an object with 'image' or 'image_id'")
        images = record.get("image_id", record.get("image"))
        if images is None and "conversations" in record:
            continue
        caption = _caption_of(record)
        if not is_text(caption):
            raise ValueError(f"{place}: found caption {caption!r}, expected text in UTF-8. Correct or remove it")
        for image in images if isinstance(images, list) else [images]:
            if not isinstance(image, str):
                raise ValueError(f"{place}, field 'image': found {image!r}, expected a path below the image folder")
            yield place, image, caption


def _caption_of(record: Mapping[str, Any]) -> str:
    for key in _CAPTION_KEYS:
        if isinstance(record.get(key), str):
            return record[key]
    return first_answer(record) or ""
