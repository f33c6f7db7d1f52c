"""Images to be captioned by name, where their files are by default, and what a model is told to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
