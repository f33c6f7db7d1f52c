"""The sprites: pictures of everyday things with their names, cut from the sheet in `assets`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

ASSETS = Path(__file__).parent / "assets"
SHEET = ASSETS / "sprites.png"
SHEET_INDEX = ASSETS / "sprites.json"


@dataclass(frozen=True)
class Sprite:
    """One picture and how English speaks of it.

    Attributes:
        name: singular, without article ("pine tree").
        article: "a" or "an".
        plural: "pine trees".
        category: animal, food, vehicle, ...
        habitat: where it is put in a scene that has such a place: "air", "water" or "ground".
        colour: the one colour a person would name, None where there is no such colour.
        simple: belongs to the smaller set of well distinguishable things.
        codepoint: the emoji, as "U+1F415".
        box_xyxy_px: its place on the sheet.
    """

    name: str
    article: str
    plural: str
    category: str
    habitat: str
    colour: str | None
    simple: bool
    codepoint: str
    box_xyxy_px: tuple[int, int, int, int]

    @property
    def with_article(self) -> str:
        """The name as a sentence introduces it: "an apple"."""
        return f"{self.article} {self.name}"


@cache
def load_sprites(*, simple_only: bool = False) -> tuple[Sprite, ...]:
    """All sprites in the order of the sheet."""
    rows = json.loads(SHEET_INDEX.read_text(encoding="utf-8"))
    sprites = tuple(Sprite(**{**row, "box_xyxy_px": tuple(row["box_xyxy_px"])}) for row in rows)
    return tuple(sprite for sprite in sprites if sprite.simple) if simple_only else sprites


@cache
def _sheet() -> Image.Image:
    with Image.open(SHEET) as sheet:
        return sheet.convert("RGBA")


@cache
def sprite_picture(sprite: Sprite) -> Image.Image:
    """The sprite's picture (RGBA), cut to its visible part. Do not change it: it is shared."""
    return _sheet().crop(sprite.box_xyxy_px)
