"""Read images as LLaVA's training does, so that masks match the pixels that the model sees.

PIL decodes images, which are rotated as their EXIF says and converted to RGB. Animations give their first frame. Sizes
and boxes refer to the image read this way. An image that cannot be read completely raises an error.
"""

from __future__ import annotations

import errno
import io
import math
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

BROKEN_IMAGE_ERRORS = (
    OSError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError, RuntimeError, LookupError, TypeError,
    ArithmeticError, struct.error,
)  # fmt: skip
"""What PIL's decoders raise for broken files: AVIF's a RuntimeError, others whatever their parser runs into."""

# Register all of PIL's formats now. PIL registers them lazily and is not thread-safe while doing so: threads that open
# their first images at the same time may skip a format and reject a valid image.
Image.init()


ERRORS_OF_A_PATH = (errno.EACCES, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)
"""Errors of a path that will never be readable. All other system errors may be temporary."""

NO_SUCH_FILE = "no such file"
NOT_PERMITTED = "a file that may not be read"
"""The reasons given for images that are missing, or whose permissions forbid to read them."""


class UnreadableImageError(ValueError):
    """Raised for an image file that is missing, not an image, truncated, or too large to decode safely."""


def _open_file(path: Path) -> Image.Image:
    """Open an image file. Pipes, sockets and devices are no such files: reading them may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("a folder, pipe or device, where a file is expected")
    return Image.open(path)


def decode_image(path: Path) -> Image.Image:
    """Decode an image file completely, as RGB.

    Raises:
        UnreadableImageError: the file can never be read. The message does not name the folder, so it is the same on
            every machine.
        OSError: the file cannot be read now, but may be valid.
    """
    try:
        with _open_file(path) as image:
            return upright_rgb(image)
    except FileNotFoundError:
        raise UnreadableImageError(NO_SUCH_FILE) from None
    except PermissionError:
        raise UnreadableImageError(NOT_PERMITTED) from None
    except UnidentifiedImageError:
        size = path.stat().st_size
        raise UnreadableImageError("an empty file" if size == 0 else f"{size} bytes that are no image") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(str(error)) from None
    except BROKEN_IMAGE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None and error.errno not in ERRORS_OF_A_PATH:
            raise OSError(f"{path}: {error.strerror}. Once it can be read again, run the same command") from error
        raise UnreadableImageError(f"cannot be decoded: {error}".replace(str(path), path.name)) from error


def decode_upload(content: bytes, most_pixels: int) -> Image.Image:
    """Decode an image from the bytes of its file, as `decode_image` does.

    Raises:
        ValueError: the bytes are no image, a broken one, or one of more pixels.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if (pixels := math.prod(image.size)) <= most_pixels:
                return upright_rgb(image)
    except BROKEN_IMAGE_ERRORS as error:
        reason = "an unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"Found no image in {len(content):,} bytes ({reason}); expected a JPEG or PNG.") from error
    raise ValueError(f"Found an image of {pixels:,} pixels, expected at most {most_pixels:,}: make it smaller.")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, rotated as its EXIF says. 16-bit greyscale is divided by 256.

    Raises:
        ValueError: greys of 32 bits, which have no known range.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose copies every image
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"greys of mode {image.mode}, whose range is unknown; save them with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # PIL's own conversion cuts at 255
        image = image.convert("I").point(lambda value: value / 256)
    return image.convert("RGB")


def upright_size_wh(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an opened file, rotated as its EXIF says. PIL has done so for TIFF."""
    turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


class ImageFileError(ValueError):
    """Raised for an image that is missing, broken, or outside the image folder; see `found` and `expected`."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"found {found}; expected {expected}")
        self.found, self.expected = found, expected


def image_path(image_folder: Path, image_id: str) -> Path:
    """Return the path of an image below the image folder.

    Raises:
        ImageFileError: for an absolute id, or one with `..`. Symbolic links inside the folder may point elsewhere.
    """
    relative = Path(image_id)
    if relative.is_absolute() or ".." in relative.parts:
        raise ImageFileError(f"{image_id!r}, which leads out of {image_folder}", "a path below the image folder")
    return image_folder / relative


@contextmanager
def _opened(image_folder: Path, image_id: str) -> Iterator[Image.Image]:
    """Open an image. Whatever is wrong with it, also where it is used, is raised as an `ImageFileError`."""
    path = image_path(image_folder, image_id)
    try:
        with _open_file(path) as image:
            yield image
    except FileNotFoundError:
        raise ImageFileError(f"no file {path}", "the image; is --image-folder the right one?") from None
    except ImageFileError:
        raise
    except BROKEN_IMAGE_ERRORS as error:
        raise ImageFileError(f"{path}, which cannot be read ({error})", "an image; download the file again") from error


def stored_size_wh(image_folder: Path, image_id: str) -> tuple[int, int]:
    """Read width and height from the file's header, rotated as its EXIF says, as in training.

    Raises:
        ImageFileError: if the file is missing or not an image.
    """
    with _opened(image_folder, image_id) as image:
        return upright_size_wh(image)


def thumbnail(image_folder: Path, image_id: str, size_wh: tuple[int, int], side: int) -> Image.Image:
    """Read an image at a smaller size: at most `side` pixels wide and high.

    Raises:
        ImageFileError: if it is missing, broken, or not of the size `size_wh` that its record says.
    """
    with _opened(image_folder, image_id) as opened:
        if (stored_wh := upright_size_wh(opened)) != size_wh:
            raise ImageFileError(f"{image_folder / image_id} of {stored_wh}", f"the record's size {size_wh}")
        opened.draft("RGB", (side, side))  # JPEG files decode at a smaller size at once
        smaller = upright_rgb(opened)
        smaller.thumbnail((side, side))
        return smaller
