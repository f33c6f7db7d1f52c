"""Read images as LLaVA's training reads them, so that masks fit the pixels that the model sees.

Images are decoded by PIL and converted to RGB whatever the mode; of an animation the first frame; EXIF rotation is not
applied. `size` and boxes are those of this picture. An image that cannot be read whole is an error, never a blank one.
"""

from __future__ import annotations

import errno
import struct
from pathlib import Path

from PIL import Image, UnidentifiedImageError

BROKEN_IMAGE_ERRORS = (
    OSError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError, RuntimeError, LookupError, TypeError,
    ArithmeticError, struct.error,
)  # fmt: skip
"""What PIL's decoders raise for broken files: AVIF's a RuntimeError, others what their parsing runs into."""

# All of PIL's formats. Where threads open the first pictures at once, each has PIL add formats while it looks through
# them, and one that was added at the wrong moment is never tried: a sound picture would be no image.
Image.init()


ERRORS_OF_A_PATH = (errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
"""What the system says of a path that will never be readable. All else it says is an outage."""


NO_SUCH_FILE = "no such file"
"""The reason of a picture that isn't there."""


class UnreadableImageError(ValueError):
    """An image that isn't there, is no image, is cut off, or is too large to be decoded safely."""


def decode_image(path: Path) -> Image.Image:
    """The whole picture as RGB.

    Raises:
        UnreadableImageError: says why; the message doesn't name the folder, so that it is the same on each machine.
        OSError: the picture may be sound, but cannot be had now.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UnreadableImageError(NO_SUCH_FILE) from None
    except UnidentifiedImageError:
        size = path.stat().st_size
        raise UnreadableImageError("an empty file" if size == 0 else f"{size} bytes that are no image") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(str(error)) from None
    except BROKEN_IMAGE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in ERRORS_OF_A_PATH:
            raise OSError(f"{path}: {error.strerror}. Once it can be read again, run the same command") from error
        raise UnreadableImageError(f"cannot be decoded: {error}".replace(str(path), path.name)) from error


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
