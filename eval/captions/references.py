"""Which images are captioned, and the captions that people wrote for them.

Read are COCO's captions (`captions_val2014.json`), Karpathy's splits of COCO (`dataset_coco.json`), files of records
`{"image": ..., "captions": [...]}`, and PAD files, each of whose records has one `caption`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_aligned.images import ImageFileError, image_path
from patch_aligned.pad import iter_records

KARPATHY_SPLIT = "test"


@dataclass(frozen=True)
class CaptionedImage:
    """An image and its reference captions.

    Attributes:
        id: COCO's number of the image, or its path.
        image: path below the image folder.
        captions: one or more.
    """

    id: str
    image: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class References:
    """Images in the file's order, and the name of the split that they are; `all` where the file has no splits."""

    images: tuple[CaptionedImage, ...]
    split: str


def read_references(path: Path, split: str | None = None) -> References:
    """Reads the images of a file and their captions.

    Args:
        path: JSON, JSON lines, either gzipped, or Parquet.
        split: of Karpathy's file; None is `test`. Other files have none.

    Raises:
        ValueError: the file is not one of these, or an image has no caption.
        RecordFileError: the file is missing, or broken.
    """
    document = _coco_document(path)
    if split is not None and (document is None or "annotations" in document):
        raise ValueError(f"--split: found {split!r}, but {path} has no splits; leave it out")
    if document is None:
        images = _from_records(iter_records(path), path)
    elif "annotations" in document:
        images = _from_coco(document, path)
    else:
        split = split or KARPATHY_SPLIT
        images = _from_karpathy(document, split, path)
    if not images:
        raise ValueError(f"{path}: found no images, expected some with captions")
    if without := [image.image for image in images if not any(caption.strip() for caption in image.captions)]:
        raise ValueError(f"{path}: found no caption of {named(without)}, expected one or more for each image")
    return References(images, split or "all")


def image_files(images: Iterable[CaptionedImage], folder: Path) -> dict[str, Path]:
    """Where each image is, by its id.

    Raises:
        ValueError: a path leads out of the folder.
        FileNotFoundError: naming the first that are missing, and how many there are.
    """
    files, missing = {}, []
    for image in images:
        try:
            files[image.id] = image_path(folder, image.image)
        except ImageFileError as error:
            raise ValueError(f"image {image.id!r}: {error}") from error
        if not files[image.id].is_file():
            missing.append(image.image)
    if missing:
        raise FileNotFoundError(
            f"--image-folder {folder}: found no {named(missing)}, {len(files) - len(missing)} of {len(files)} images "
            "are there; is it the folder that the paths of the references count from?"
        )
    return files


def named(items: Sequence[str], most: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _coco_document(path: Path) -> dict[str, Any] | None:
    """The file, if it is one JSON object as COCO's and Karpathy's are; None for a file of records."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        if not file.read(4096).lstrip().startswith("{"):
            return None
        file.seek(0)
        try:
            document = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: no JSON: {error}. Is the file cut off? Fetch it again.") from error
    if not isinstance(document.get("images"), list):
        raise ValueError(f"{path}: found the keys {', '.join(document)}; expected 'images' among them, as in COCO")
    return document


def _from_coco(document: Mapping[str, Any], path: Path) -> tuple[CaptionedImage, ...]:
    captions: dict[Any, list[str]] = {}
    for number, annotation in enumerate(document["annotations"]):
        place = f"{path}: annotations[{number}]"
        captions.setdefault(_value(annotation, "image_id", int | str, place), []).append(
            _value(annotation, "caption", str, place)
        )
    images = []
    for number, image in enumerate(document["images"]):
        place = f"{path}: images[{number}]"
        image_id = _value(image, "id", int | str, place)
        name = _value(image, "file_name", str, place)
        images.append(CaptionedImage(str(image_id), name, tuple(captions.pop(image_id, ()))))
    if captions:
        raise ValueError(f"{path}: found captions of images {named([*map(str, captions)])}, which 'images' lacks")
    return _require_once(images, path)


def _from_karpathy(document: Mapping[str, Any], split: str, path: Path) -> tuple[CaptionedImage, ...]:
    images, splits = [], set()
    for number, image in enumerate(document["images"]):
        place = f"{path}: images[{number}]"
        splits.add(_value(image, "split", str, place))
        if image["split"] != split:
            continue
        sentences = _value(image, "sentences", list, place)
        name = _value(image, "filename", str, place)
        name = f"{image['filepath']}/{name}" if image.get("filepath") else name
        captions = tuple(_value(sentence, "raw", str, f"{place}.sentences") for sentence in sentences)
        images.append(CaptionedImage(str(image.get("cocoid", name)), name, captions))
    if split not in splits:
        raise ValueError(f"--split: found {split!r}, expected one of {', '.join(sorted(splits))} as in {path}")
    return _require_once(images, path)


def _from_records(records: Iterable[Any], path: Path) -> tuple[CaptionedImage, ...]:
    """Records of one image are put together: some files have a caption a record."""
    captions: dict[str, list[str]] = {}
    for number, record in enumerate(records):
        place = f"{path}: record {number}"
        name = _value(record, "image_id" if "image" not in record else "image", str, place)
        captions.setdefault(name, []).extend(_captions_of(record, place))
    return tuple(CaptionedImage(name, name, tuple(texts)) for name, texts in captions.items())


def _captions_of(record: Mapping[str, Any], place: str) -> Iterator[str]:
    if "captions" not in record:
        yield _value(record, "caption", str, place)
        return
    for caption in _value(record, "captions", list, place):
        if not isinstance(caption, str):
            raise ValueError(f"{place}, field 'captions': found {caption!r}, expected texts")
        yield caption


def _value(record: Any, name: str, kind: Any, place: str) -> Any:
    """A field, checked."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{place}: found {str(record)[:60]!r}, expected an object with {name!r}")
    value = record.get(name)
    if not isinstance(value, kind):
        found = f"no such field among {', '.join(record)}" if name not in record else repr(value)[:60]
        expected = {str: "a text", list: "a list"}.get(kind, "a number")
        raise ValueError(f"{place}, field {name!r}: found {found}, expected {expected}")
    return value


def _require_once(images: list[CaptionedImage], path: Path) -> tuple[CaptionedImage, ...]:
    times = Counter(image.id for image in images)
    if twice := [image_id for image_id, count in times.items() if count > 1]:
        raise ValueError(f"{path}: found images {named(twice)} twice, expected each once")
    return tuple(images)


# Images to be captioned by name, where their files are by default, and what a model is told to do.

PROMPT = "Provide a one-sentence caption for the provided image."
"""lmms-eval's prompt for COCO. The paper states neither its prompt nor its images."""

_COCO = Path("playground/data/coco")
_MINIATURE = Path("playground/data/mini/heldout")


@dataclass(frozen=True)
class CaptionSet:
    """Images and where their captions are, counted from the root of the repository.

    Attributes:
        name: of the benchmark.
        column: as tables show it.
        references: file of the captions.
        image_folder: what the images' paths count from.
        next_step: how to get the file.
        prompt: what the model is told to do, but for a `plain` template, which is told nothing.
    """

    name: str
    column: str
    references: Path
    image_folder: Path
    next_step: str = "name the file by --references and its folder of images by --image-folder"
    prompt: str = PROMPT


def _coco(year: int) -> CaptionSet:
    return CaptionSet(
        f"captions_coco{year}",
        f"COCO {year} val",
        _COCO / f"annotations/captions_val{year}.json",
        _COCO / f"val{year}",
        f"unpack annotations_trainval{year}.zip and val{year}.zip of cocodataset.org into {_COCO}, or give "
        "--references and --image-folder",
    )


CAPTION_SETS = {
    caption_set.name: caption_set
    for caption_set in (
        _coco(2014),
        _coco(2017),
        CaptionSet(
            "captions_mini",
            "the miniature's held-out scenes",
            _MINIATURE / "captions.json",
            _MINIATURE,
            "python -m playground.mini.reference_captions",
            "Give the picture a caption.",  # as its stage 2 has it
        ),
    )
}


def choose_set(name: str | None, references: Path | None, image_folder: Path | None) -> CaptionSet:
    """A set by its name, with other files where these are given, or one of the user's own.

    Raises:
        ValueError: neither a name nor files; the message says what there is.
        FileNotFoundError: the file of captions is not there; the message says how to get it.
    """
    known = CAPTION_SETS.get(name or "")
    if known is None and (references is None or image_folder is None):
        raise ValueError(
            f"--benchmark: found {name!r}, expected one of {', '.join(CAPTION_SETS)}; for captions of your own give "
            "--references FILE and --image-folder DIR"
        )
    if known is None:
        assert references is not None and image_folder is not None
        own = name or f"captions_{references.name.split('.')[0]}"
        known = CaptionSet(own, references.name, references, image_folder)
    chosen = CaptionSet(
        known.name,
        known.column,
        references or known.references,
        image_folder or known.image_folder,
        known.next_step,
        known.prompt,
    )
    if not chosen.references.is_file():
        raise FileNotFoundError(f"{chosen.references}: found no such file of captions; next: {chosen.next_step}")
    return chosen
