"""Reading images as LLaVA's training reads them, so that masks fit the pixels that the model will see.

That means: decoded by PIL, converted to RGB whatever the mode, the first frame of an animation, and *not* rotated by
EXIF. `size` and boxes are those of this picture. An image that can't be read whole is an error, never a blank picture.
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


class StorageError(OSError):
    """The storage failed, not the picture: a mount that went away, too many open files. Nothing may be recorded."""


class UnreadableImageError(ValueError):
    """An image that isn't there, is no image, is cut off, or is too large to be decoded safely."""


def decode_image(path: Path) -> Image.Image:
    """The whole picture as RGB.

    Raises:
        UnreadableImageError: says why; the message doesn't name the folder, so that it is the same on each machine.
        StorageError: the picture may be sound, but cannot be had now.
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
            raise StorageError(f"{path}: {error.strerror}. Once it can be read again, run the same command") from error
        raise UnreadableImageError(f"cannot be decoded: {error}".replace(str(path), path.name)) from error
