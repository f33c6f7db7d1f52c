"""Token maps as one HTML file that holds its images and loads nothing, and the same words and numbers as JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from patch_aligned.analysis.token_map import MappedImage, TokenMap, TokenMaps, colours_of_words, map_caption
from patch_aligned.html_page import html_page

_DIGITS = 4
_JPEG_QUALITY = 85


def token_map_document(maps: TokenMaps) -> dict[str, Any]:
    """Everything that the page shows, but for the pictures."""
    entries: list[dict[str, Any]] = []
    marks = False
    for image in maps.images:
        colours = colours_of_words(image)
        of_image = [_map_entry(name, token_map, colours) for name, token_map in image.maps.items()]
        marks |= any(word["starts_word"] for map_entry in of_image for word in map_entry["words"].values())
        entries.append({"image_id": image.image_id, "top_cosine": round(image.top_cosine, _DIGITS), "maps": of_image})
    return {
        "method": maps.settings.described(),
        "word_list": maps.word_list.name if maps.word_list else None,
        "marks_words": marks,
        "projectors": maps.sources,
        "images": entries,
    }


def write_token_map_page(maps: TokenMaps, folder: Path) -> list[Path]:
    """Writes `token_map.html` and `token_map.json` into a folder, which is made where it is missing.

    Returns:
        Their paths.
    """
    document = token_map_document(maps)
    folder.mkdir(parents=True, exist_ok=True)
    page, numbers = folder / "token_map.html", folder / "token_map.json"
    numbers.write_text(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    entries = []
    for entry, image in zip(document["images"], maps.images, strict=True):
        pictures, picture_of = distinct_pictures(image)
        entries.append({**entry, "pictures": pictures, "picture_of": picture_of})
    shown = {**document, "images": entries}
    page.write_text(html_page(__package__, "token_map", "Token maps", shown), encoding="utf-8")
    return [page, numbers]


def _map_entry(name: str, token_map: TokenMap, colours: Mapping[str, str]) -> dict[str, Any]:
    pursuit = token_map.pursuit
    words = {}
    for token_id, word in token_map.words.items():
        words[str(token_id)] = {
            "text": word.token.text,
            "starts_word": word.token.starts_word,
            "special": word.token.special,
            "english": word.english,
        }
        if word.english:
            words[str(token_id)]["colour"] = colours[word.token.text.lower()]
    return {
        "projector": name,
        "grid": list(token_map.grid),
        "captions": [map_caption(token_map, turn) for turn in range(pursuit.ids.shape[1])],
        "ids": pursuit.ids.tolist(),
        "coefficients": _rounded(pursuit.coefficients),
        "cosines": _rounded(pursuit.cosines),
        "residual_norms": _rounded(pursuit.residual_norms),
        "words": words,
    }


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, _DIGITS) for value in row] for row in values.tolist()]


def distinct_pictures(image: MappedImage) -> tuple[list[str], dict[str, int]]:
    """The different pictures under an image's maps, as `data:` addresses, and which of them each projector has."""
    addresses = {name: _data_uri(picture) for name, picture in image.pictures.items()}
    pictures = list(dict.fromkeys(addresses.values()))
    return pictures, {name: pictures.index(address) for name, address in addresses.items()}


def _data_uri(image: Tensor) -> str:
    """A picture `[3, height, width]`, 0..1, as the address of an `img` that holds it."""
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()  # [3, side, side] -> [side, side, 3]
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
