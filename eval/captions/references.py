"""Images to caption, and the captions that people wrote for them.

Reads COCO's captions (`captions_val2014.json`), Karpathy's splits of COCO (`dataset_coco.json`), files of records
`{"image": ..., "captions": [...]}`, and PAD files, which have one `caption` per record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from patch_aligned.files import validated
from patch_aligned.images import ImageFileError, image_path
from patch_aligned.record_files import beginning_of, iter_records, named, read_document

KARPATHY_SPLIT = "test"


@dataclass(frozen=True)
class CaptionedImage:
    """An image and its reference captions."""

    id: str  # COCO's number of the image, or its path
    image: str  # path below the image folder
    captions: tuple[str, ...]  # one or more


@dataclass(frozen=True)
class References:
    """The images of a file in order, and the name of their split; `all` if the file has no splits."""

    images: tuple[CaptionedImage, ...]
    split: str


class _CocoImage(BaseModel):
    id: int | str
    file_name: str


class _CocoCaption(BaseModel):
    image_id: int | str
    caption: str


class _Coco(BaseModel):
    images: list[_CocoImage]
    annotations: list[_CocoCaption]


class _Sentence(BaseModel):
    raw: str


class _KarpathyImage(BaseModel):
    filename: str
    split: str
    sentences: list[_Sentence]
    filepath: str = ""
    cocoid: int | str | None = None


class _Karpathy(BaseModel):
    images: list[_KarpathyImage]


class _Record(BaseModel):
    image: Annotated[str, Field(validation_alias=AliasChoices("image", "image_id"))]
    captions: Annotated[
        list[str],
        Field(validation_alias=AliasChoices("captions", "caption")),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ]


def read_references(path: Path, split: str | None = None) -> References:
    """Read the images of a file and their captions; `split` is of Karpathy's file alone, where None is `test`."""
    document = _document(path)
    if split is not None and (document is None or "annotations" in document):
        raise ValueError(f"--split: found {split!r}, but {path} has no splits; leave it out")
    if document is None:
        images = _from_records(path)
    elif "annotations" in document:
        images = _from_coco(validated(_Coco, document, path), path)
    else:
        split = split or KARPATHY_SPLIT
        images = _from_karpathy(validated(_Karpathy, document, path), split, path)
    if not images:
        raise ValueError(f"{path}: found no images, expected some with captions")
    times = Counter(image.id for image in images)
    if twice := [image_id for image_id, count in times.items() if count > 1]:
        raise ValueError(f"{path}: found images {named(twice)} twice, expected each once")
    if without := [image.image for image in images if not any(caption.strip() for caption in image.captions)]:
        raise ValueError(f"{path}: found no caption of {named(without)}, expected one or more for each image")
    return References(tuple(images), split or "all")


def image_files(images: Iterable[CaptionedImage], folder: Path) -> dict[str, Path]:
    """Return the path of each image's file by its id; `FileNotFoundError` names the first missing ones."""
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


def _document(path: Path) -> dict[str, Any] | None:
    """The file, if it is one JSON object as COCO's and Karpathy's are; None for a file of records."""
    if path.suffix.lower() != ".json" or not path.is_file() or not beginning_of(path).startswith("{"):
        return None
    document = read_document(path)
    if not isinstance(document.get("images"), list):
        raise ValueError(f"{path}: found the keys {', '.join(document)}; expected 'images' among them, as in COCO")
    return document


def _from_coco(coco: _Coco, path: Path) -> list[CaptionedImage]:
    captions: dict[int | str, list[str]] = {}
    for annotation in coco.annotations:
        captions.setdefault(annotation.image_id, []).append(annotation.caption)
    images = [
        CaptionedImage(str(image.id), image.file_name, tuple(captions.get(image.id, ()))) for image in coco.images
    ]
    if unknown := captions.keys() - {image.id for image in coco.images}:
        names = [str(image_id) for image_id in captions if image_id in unknown]
        raise ValueError(f"{path}: found captions of images {named(names)}, which 'images' lacks")
    return images


def _from_karpathy(karpathy: _Karpathy, split: str, path: Path) -> list[CaptionedImage]:
    splits = sorted({image.split for image in karpathy.images})
    if split not in splits:
        raise ValueError(f"--split: found {split!r}, expected one of {', '.join(splits)} as in {path}")
    images = []
    for image in karpathy.images:
        if image.split == split:
            name = f"{image.filepath}/{image.filename}" if image.filepath else image.filename
            image_id = name if image.cocoid is None else str(image.cocoid)
            images.append(CaptionedImage(image_id, name, tuple(sentence.raw for sentence in image.sentences)))
    return images


def _from_records(path: Path) -> list[CaptionedImage]:
    """Captions of records with the same image are joined: some files have one record per caption."""
    captions: dict[str, list[str]] = {}
    for number, record in enumerate(iter_records(path)):
        found = validated(_Record, record, f"{path}: record {number}")
        captions.setdefault(found.image, []).extend(found.captions)
    return [CaptionedImage(name, name, tuple(texts)) for name, texts in captions.items()]


# Sets of images known by name: default places of their files, and prompts.

PROMPT = "Provide a one-sentence caption for the provided image."
"""lmms-eval's prompt for COCO. The paper states neither its prompt nor its images."""

_COCO = Path("playground/data/coco")
_MINIATURE = Path("playground/data/mini/heldout")


@dataclass(frozen=True)
class CaptionSet:
    """Images and their captions. Paths are relative to the root of the repository."""

    name: str  # of the benchmark
    column: str  # as tables show it
    references: Path  # file of the captions
    image_folder: Path  # base of the images' paths
    next_step: str = "name the file by --references and its folder of images by --image-folder"  # to get the file
    prompt: str = PROMPT  # not used with a `plain` template


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
            "Give the picture a caption.",  # as in its stage 2
        ),
    )
}


def choose_set(name: str | None, references: Path | None, image_folder: Path | None) -> CaptionSet:
    """Return a known set, with other files if these are given, or a new one for the user's files."""
    known = CAPTION_SETS.get(name or "")
    if known is None:
        if references is None or image_folder is None:
            raise ValueError(
                f"--benchmark: found {name!r}, expected one of {', '.join(CAPTION_SETS)}; for your own captions give "
                "--references FILE and --image-folder DIR"
            )
        own = name or f"captions_{references.name.split('.')[0]}"
        known = CaptionSet(own, references.name, references, image_folder)
    chosen = replace(known, references=references or known.references, image_folder=image_folder or known.image_folder)
    if not chosen.references.is_file():
        raise FileNotFoundError(f"{chosen.references}: found no such file of captions; next: {chosen.next_step}")
    return chosen
