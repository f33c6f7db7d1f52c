"""Preprocess images and prompts: pixel tensors, token ids, stopping criteria. Names are upstream's."""

from __future__ import annotations

import ast
import base64
import binascii
import io
import math
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.plugin import ImageView

if TYPE_CHECKING:
    from torch import Tensor

    from llava.stopping_criteria import KeywordsStoppingCriteria

__all__ = [
    "KeywordsStoppingCriteria",
    "UnreadableImageError",
    "divide_to_patches",
    "expand2square",
    "get_anyres_image_grid_shape",
    "get_model_name_from_path",
    "image_view_of",
    "load_image_from_base64",
    "load_rgb_image",
    "process_anyres_image",
    "process_images",
    "processed_side",
    "require_image_tokens",
    "resize_and_pad_image",
    "select_best_resolution",
    "tokenizer_image_token",
    "upright_rgb",
    "with_space_prefix",
]


def __getattr__(name: str) -> Any:
    if name != "KeywordsStoppingCriteria":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llava import stopping_criteria  # it needs torch, which commands import after their arguments

    return stopping_criteria.KeywordsStoppingCriteria


_TREATMENTS: dict[str | None, Literal["crop", "pad", "squeeze"]] = {
    None: "crop",
    "square": "crop",
    "pad": "pad",
    "anyres": "squeeze",
}


_LARGEST_CANVAS = 1 << 30
"""Pixels that an image may have on the way to a square; 3 GB."""


class UnreadableImageError(OSError):
    """Raised for an image file that exists but cannot be decoded. The message names it and says what to do."""


def load_rgb_image(path: str | Path) -> Image.Image:
    """Read an image completely, as RGB, rotated as its EXIF says. Animations give their first frame.

    Raises:
        FileNotFoundError: if the file does not exist.
        UnreadableImageError: if the file is not an image, is truncated, or is too large to decode safely.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # reading a pipe or a device may never end
            raise ValueError("a folder, pipe or device, where a file is expected")
        with Image.open(path) as image:
            return upright_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image file; check the image folder and the data's paths") from None
    except UnidentifiedImageError:
        found = _begins_with(path)
        raise UnreadableImageError(f"{path}: found {found}, expected an image; download the file again") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(
            f"{path}: {error}. Shrink the image, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from None
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:  # what PIL's decoders raise for broken files
        raise UnreadableImageError(f"{path}: cannot be decoded ({error}); download the file again") from error


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


def _begins_with(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        head = file.read(12)
    return f"a file that begins with {head!r}" if head else "an empty file"


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Decode an image from base64 text.

    Raises:
        UnreadableImageError: if the text is not base64, or its bytes are not an image.
    """
    try:
        return Image.open(io.BytesIO(base64.b64decode(image)))
    except (binascii.Error, UnidentifiedImageError) as error:
        raise UnreadableImageError(f"base64 image of {len(image)} characters: {error}") from error


def expand2square(pil_img: Image.Image, background_color: Any) -> Image.Image:
    """Centre an image on a square canvas of `background_color`. A square image is returned unchanged."""
    if pil_img.width == pil_img.height:
        return pil_img
    side = max(pil_img.size)
    canvas = Image.new(pil_img.mode, (side, side), background_color)
    canvas.paste(pil_img, ((side - pil_img.width) // 2, (side - pil_img.height) // 2))
    return canvas


def letterboxed_wh(original_wh: tuple[int, int], target_wh: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size with the image's aspect ratio inside `target_wh`; the shorter side is rounded up, as
    upstream does.
    """
    width, height = original_wh
    target_width, target_height = target_wh
    scale_x, scale_y = target_width / width, target_height / height
    if scale_x < scale_y:
        return target_width, min(math.ceil(height * scale_x), target_height)
    return min(math.ceil(width * scale_y), target_width), target_height


def select_best_resolution(original_size: tuple[int, int], possible_resolutions: Sequence[Any]) -> Any:
    """Return the resolution (width, height) that keeps most of the image's pixels, then the least empty area.

    Remaining ties go to the first, as upstream does.
    """
    if not possible_resolutions:
        raise ValueError("possible_resolutions: found none, expected at least one (width, height)")
    width, height = original_size

    def kept_and_unused(resolution: Any) -> tuple[int, int]:
        target_width, target_height = resolution
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - target_width * target_height

    return max(possible_resolutions, key=kept_and_unused)


def parse_grid_pinpoints(grid_pinpoints: Any, side: int = 1) -> list[Any]:
    """Parse the config's `image_grid_pinpoints`: a list of (width, height) of tiles of `side`, or its text form."""
    try:
        pinpoints = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else list(grid_pinpoints)
        is_valid = all(len(pair) == 2 and all(type(px) is int and px >= side for px in pair) for pair in pinpoints)
        is_valid = is_valid and not any(px % side for pair in pinpoints for px in pair)
    except (SyntaxError, TypeError, ValueError):
        is_valid = False
    if not is_valid or not pinpoints:
        multiples = f", multiples of the tower's side {side}" if side > 1 else ""
        raise ValueError(
            f"image_grid_pinpoints: found {grid_pinpoints!r}, expected a list of [width, height] in pixels{multiples}"
        )
    return list(pinpoints)


def get_anyres_image_grid_shape(image_size: tuple[int, int], grid_pinpoints: Any, patch_size: int) -> tuple[int, int]:
    """Return the number of tiles across and down for `image_size` (width, height); `patch_size` is a tile's side."""
    width, height = select_best_resolution(image_size, parse_grid_pinpoints(grid_pinpoints, patch_size))
    return width // patch_size, height // patch_size


def resize_and_pad_image(image: Image.Image, target_resolution: tuple[int, int]) -> Image.Image:
    """Fit an image into `target_resolution` (width, height), centred on black."""
    target_width, target_height = target_resolution
    width, height = letterboxed_wh(image.size, target_resolution)
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(image.resize((width, height)), ((target_width - width) // 2, (target_height - height) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Split an image into square tiles of `patch_size` pixels, row by row."""
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, image.height, patch_size)
        for left in range(0, image.width, patch_size)
    ]


def process_anyres_image(image: Image.Image, processor: Any, grid_pinpoints: Any) -> Tensor:
    """Return `[1 + tiles, 3, side, side]`: an RGB image squeezed to a square, then tiles of its letterboxed copy."""
    import torch

    side = processed_side(processor)
    resolution = select_best_resolution(image.size, parse_grid_pinpoints(grid_pinpoints, side))
    edge = _shortest_edge(processor) or side
    tiles = divide_to_patches(resize_and_pad_image(image, resolution), side)
    return torch.stack([_pixel_values(processor, tile) for tile in (image.resize((edge, edge)), *tiles)])


def process_images(images: Sequence[Image.Image], image_processor: Any, model_cfg: Any) -> Tensor | list[Tensor]:
    """Preprocess images according to the config's `image_aspect_ratio`: None, "square", "original", "pad" or "anyres".

    lmms-eval's tasks write "original" into configs without a value. It means the processor alone, like "square".

    Returns:
        `[images, 3, side, side]` (anyres: `[images, 1 + tiles, 3, side, side]`), or a list if shapes differ.

    Raises:
        ValueError: for another `image_aspect_ratio`.
    """
    import torch

    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    if aspect_ratio not in (None, "square", "original", "pad", "anyres"):
        raise ValueError(f"image_aspect_ratio: found {aspect_ratio!r}, expected 'square', 'pad' or 'anyres'")
    tensors = []
    for image in images:
        rgb = image if image.mode == "RGB" else upright_rgb(image)
        if aspect_ratio == "anyres":
            tensors.append(process_anyres_image(rgb, image_processor, model_cfg.image_grid_pinpoints))
            continue
        _require_room(rgb.size, aspect_ratio, _shortest_edge(image_processor))
        if aspect_ratio == "pad":
            rgb = expand2square(rgb, tuple(int(channel * 255) for channel in image_processor.image_mean))
        tensors.append(_pixel_values(image_processor, rgb))
    if tensors and all(tensor.shape == tensors[0].shape for tensor in tensors):
        return torch.stack(tensors)
    return tensors


def _require_room(size_wh: tuple[int, int], aspect_ratio: str | None, edge: int | None) -> None:
    """Raise `ValueError` for an image so narrow that making it square would take gigabytes of memory."""
    shorter, longer = sorted(size_wh)
    canvas = longer**2 if aspect_ratio == "pad" else 0 if edge is None else edge**2 * longer // shorter
    if canvas > _LARGEST_CANVAS:
        raise ValueError(
            f"found an image of {size_wh[0]} x {size_wh[1]} pixels, which {canvas / 1e9:.1f} billion pixels would make "
            "square; expected one that is less narrow. Crop it or leave it out"
        )


def image_view_of(
    image_size: tuple[int, int],
    image_processor: Any,
    image_aspect_ratio: str | None,
    grid: tuple[int, int],
    seen_side: int | None = None,
) -> ImageView:
    """Describe what `process_images` does to an image of `image_size` (width, height) with this processor.

    A processor that squeezes images to a square instead of cropping (SigLIP's) gives the treatment `squeeze`.

    Args:
        image_size: width and height of the image file, pixels.
        image_processor: image processor of the vision tower.
        image_aspect_ratio: None or "square", "pad", "anyres" (the base tile).
        grid: rows and columns of visual tokens.
        seen_side: the tower's `seen_side`; None if its patches cover the processor's output.

    Raises:
        ValueError: for another `image_aspect_ratio`.
    """
    if image_aspect_ratio not in _TREATMENTS:
        raise ValueError(f"image_aspect_ratio: found {image_aspect_ratio!r}, expected 'square', 'pad' or 'anyres'")
    treatment = _TREATMENTS[image_aspect_ratio]
    side, edge = processed_side(image_processor), _shortest_edge(image_processor)
    if edge is None and treatment == "crop":
        treatment = "squeeze"
    width, height = image_size
    return ImageView((width, height), treatment, edge or side, side, seen_side or side, grid)


def _pixel_values(processor: Any, image: Image.Image) -> Tensor:
    preprocess = getattr(processor, "preprocess", processor)
    return preprocess(image, return_tensors="pt")["pixel_values"][0]  # [3, side, side]


def _shortest_edge(processor: Any) -> int | None:
    """Return the length to which the processor resizes the shortest edge, or None if it squeezes both edges."""
    size = processor.size
    return size if isinstance(size, int) else dict(size).get("shortest_edge")


def processed_side(processor: Any) -> int:
    """Return the side of the processor's square output, in pixels.

    Raises:
        ValueError: the output is not a square.
    """
    crop = getattr(processor, "crop_size", None)
    size = crop if crop and getattr(processor, "do_center_crop", True) else processor.size
    if isinstance(size, int):
        return size
    lengths = dict(size)
    height = lengths.get("height", lengths.get("shortest_edge"))
    if height is None or lengths.get("width", height) != height:
        raise ValueError(f"image processor {type(processor).__name__}: found output size {lengths}, expected a square")
    return height


def require_image_tokens(prompt: str, images: int, where: str) -> None:
    """Check that a prompt has one `<image>` for each image."""
    found = prompt.count(DEFAULT_IMAGE_TOKEN)
    if found != images:
        raise ValueError(
            f"{where}: found {found} {DEFAULT_IMAGE_TOKEN} in the text, expected {images}, one for each image; "
            f"add or remove {DEFAULT_IMAGE_TOKEN} in {prompt[:200]!r}"
        )


def with_space_prefix(text: str, tokenizer: Any) -> str:
    """Adjust `text` so that the `tokenizers` library gives the same ids as SentencePiece itself.

    SentencePiece puts a space before every text. The `tokenizers` library omits it if the text already begins with a
    space, so that " and" and "and" get the same ids.
    """
    # upstream parity: a space after `<image>` was two pieces when the published checkpoints were trained.
    # Byte-level tokenizers tell "and" from " and", and SentencePiece itself tells " and" from "  and".
    if text[:1] == " " and tokenizer.tokenize(" a") == tokenizer.tokenize("a"):
        return " " + text
    return text


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | Tensor:
    """Tokenise a prompt, with `image_token_index` in place of each `<image>`.

    The pieces between images are tokenised separately, after one BOS if the tokenizer adds one.

    Args:
        prompt: text with any number of `<image>`.
        tokenizer: tokenizer of the LLM.
        image_token_index: id that represents an image.
        return_tensors: "pt" for an int64 tensor `[length]`, None for a list.

    Raises:
        ValueError: for another `return_tensors`.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"Unsupported tensor type: {return_tensors}")
    # Use the empty text: a prompt may itself begin with the BOS token (chatml, where it is `<|im_start|>`).
    bos = tokenizer("").input_ids[:1]
    ids: list[int] = bos if bos == [tokenizer.bos_token_id] else []
    for position, piece in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        if position:
            ids.append(image_token_index)
        if piece:
            ids.extend(tokenizer(with_space_prefix(piece, tokenizer), add_special_tokens=False).input_ids)
    if return_tensors is None:
        return ids
    import torch

    return torch.tensor(ids, dtype=torch.long)


def get_model_name_from_path(model_path: str) -> str:
    """Return the last part of a path; for a training checkpoint `<parent>_checkpoint-N`."""
    *parents, name = model_path.strip("/").split("/")
    return f"{parents[-1]}_{name}" if parents and name.startswith("checkpoint-") else name
