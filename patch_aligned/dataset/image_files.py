"""Images of a PAD file on disk: where one is, and how large it is, without decoding it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from patch_aligned.annotate.decoding import BROKEN_IMAGE_ERRORS


class ImageFileError(ValueError):
    """An image that is missing, broken, or outside the image folder; `found` and `expected` say so."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"found {found}; expected {expected}")
        self.found, self.expected = found, expected


def image_path(image_folder: Path, image_id: str) -> Path:
    """Path of an image, which its id must not lead out of the image folder.

    Raises:
        ImageFileError: for an absolute id, or one with `..`. Symbolic links inside the folder may lead elsewhere.
    """
    relative = Path(image_id)
    if relative.is_absolute() or ".." in relative.parts:
        raise ImageFileError(f"{image_id!r}, which leads out of {image_folder}", "a path below the image folder")
    return image_folder / relative


def stored_size_wh(image_folder: Path, image_id: str) -> tuple[int, int]:
    """Width and height as the file's header has them; EXIF rotation is not applied, as in training.

    Raises:
        ImageFileError: if there is no such file, or it is no image.
    """
    path = image_path(image_folder, image_id)
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        raise ImageFileError(f"no file {path}", "the image; is --image-folder the right one?") from None
    except BROKEN_IMAGE_ERRORS as error:
        raise ImageFileError(f"{path}, which cannot be read ({error})", "an image; fetch the file anew") from error
