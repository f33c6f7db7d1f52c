"""Captions that a model wrote: kept as they come, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.captions.references import CaptionedImage, named
from patch_aligned.record_files import iter_records

_IMAGE_KEYS = ("image_id", "image")
_CAPTION_KEYS = ("caption", "answer", "text")


class AnswerFileError(ValueError):
    """Captions that do not fit the images; the message names file, record, field, found and expected."""


class CaptionLog:
    """Captions of one model with one prompt, in files of a folder: each process writes its own, and reads all.

    Attributes:
        known: captions by the image's id, of those images whose file is the one that was captioned.
    """

    def __init__(self, folder: Path, identity: str, files: Mapping[str, Path], rank: int = 0) -> None:
        """Opens the log.

        Args:
            folder: of the files; made with the first caption.
            identity: stands for all that captions depend on besides the image; goes into the files' names.
            files: where each image is, by its id.
            rank: of this process.

        Raises:
            AnswerFileError: a line is no caption.
        """
        self._path = folder / f"{identity}-{rank}.jsonl"
        self._stamps = {image: _stamp(file) for image, file in files.items()}
        self.known: dict[str, str] = {}
        for path in sorted(folder.glob(f"{identity}-*.jsonl")):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]  # the last line of a process that was killed may be cut
            for number, line in enumerate(whole.splitlines(), start=1):
                try:
                    image, stamp, caption = json.loads(line)
                except (TypeError, ValueError) as error:
                    raise AnswerFileError(f"{path}, line {number}: found no caption; next: delete the file") from error
                if stamp == self._stamps.get(image):
                    self.known[image] = caption
            if path == self._path and whole != content:  # or the next line would be glued to it
                os.truncate(path, len(whole))  # other processes may be reading the lines that stay

    def keep(self, image: str, caption: str) -> None:
        """Adds a caption."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="ascii") as file:
            file.write(json.dumps([image, self._stamps[image], caption]) + "\n")
        self.known[image] = caption


def read_answers(path: Path, images: Sequence[CaptionedImage]) -> dict[str, str]:
    """Captions of another source: COCO's results (`image_id`, `caption`), or records of `image` and `answer`.

    Args:
        path: JSON, JSON lines, either gzipped, or Parquet.
        images: what is captioned. Records name them by id or by path.

    Returns:
        Captions by the image's id.

    Raises:
        AnswerFileError: a record is no caption, or of no such image, or of one that has a caption already.
        RecordFileError: the file is missing, or broken.
    """
    ids = {name: image.id for image in images for name in (image.image, image.id)}
    answers: dict[str, str] = {}
    unknown = []
    for number, record in enumerate(iter_records(path)):
        place = f"{path}: record {number}"
        name = str(_first(record, _IMAGE_KEYS, int | str, place))
        caption = _first(record, _CAPTION_KEYS, str, place)
        if name not in ids:
            unknown.append(name)
        elif ids[name] in answers:
            raise AnswerFileError(f"{place}: found image {name!r} a second time, expected one caption of each")
        else:
            answers[ids[name]] = caption
    if unknown:
        raise AnswerFileError(
            f"{path}: found captions of {named(unknown)}, which are not among the {len(images)} images of the "
            "references; are these the captions of the same images?"
        )
    return answers


def _stamp(file: Path) -> list[int]:
    """Changes with what is in a file: its size and the time of its last change."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _first(record: Any, names: tuple[str, ...], kind: Any, place: str) -> Any:
    """The first of some fields that a record has."""
    found = next((record[name] for name in names if name in record), None) if isinstance(record, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        keys = ", ".join(record) if isinstance(record, dict) else str(record)[:60]
        raise AnswerFileError(f"{place}: found {keys}; expected a text or number in one of {', '.join(names)}")
    return found
