"""The sprites: pictures of everyday things with their names, cut from the sheet in `assets`; tints; held-out names."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ASSETS = Path(__file__).parent / "assets"
SHEET = ASSETS / "sprites.png"
SHEET_INDEX = ASSETS / "sprites.json"

TINTS = {
    "red": "#d8232a",
    "yellow": "#f0d020",
    "green": "#2f9e3a",
    "blue": "#2a5bd7",
    "purple": "#7d35b5",
    "pink": "#f285b5",
    "brown": "#7a4a24",
    "grey": "#8c8c8c",
}
HELD_OUT = frozenset(("owl", "frog", "zebra", "fox", "snail", "pear", "lemon", "carrot", "pizza", "cake"))
"""Names of the simple set that no text of any data set mentions, whatever its seed."""
_HELD_OUT_A_KIND = 5


@dataclass(frozen=True)
class Sprite:
    """One picture and how English speaks of it."""

    name: str  # singular, without article ("pine tree")
    article: str  # "a" or "an"
    plural: str  # "pine trees"
    category: str  # animal, food, vehicle ...
    habitat: str  # where it is put in a scene that has such a place: "air", "water" or "ground"
    tokens: int  # number of tokens of the name in a sentence, by SmolLM2's tokenizer
    simple: bool  # belongs to the smaller set of well distinguishable things
    codepoint: str  # the emoji, as "U+1F415"
    box_xyxy_px: tuple[int, int, int, int]  # its place on the sheet

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


def names_by_kind(names: frozenset[str]) -> dict[tuple[str, int], list[str]]:
    """Those names of the simple set, in the order of the sheet, by category and number of tokens."""
    kinds: dict[tuple[str, int], list[str]] = defaultdict(list)
    for sprite in load_sprites(simple_only=True):
        if sprite.name in names:
            kinds[sprite.category, sprite.tokens].append(sprite.name)
    return dict(kinds)


def held_out_names(seed: int | None = None) -> frozenset[str]:
    """`HELD_OUT`, and with a seed ten more: five of each of two kinds that keep two names at least."""
    if seed is None:
        return HELD_OUT
    rng = np.random.default_rng(seed)
    rest = names_by_kind(frozenset(sprite.name for sprite in load_sprites(simple_only=True)) - HELD_OUT)
    large = [names for names in rest.values() if len(names) >= _HELD_OUT_A_KIND + 2]
    kinds = [large[i] for i in rng.choice(len(large), 2, replace=False)]
    return HELD_OUT | {str(name) for names in kinds for name in rng.choice(names, _HELD_OUT_A_KIND, replace=False)}


@cache
def _sheet() -> Image.Image:
    with Image.open(SHEET) as sheet:
        return sheet.convert("RGBA")


@cache
def sprite_picture(sprite: Sprite, tint: str | None = None) -> Image.Image:
    """The sprite's picture (RGBA), cut to its visible part, in shades of `tint`. Do not change it: it is shared."""
    picture = _sheet().crop(sprite.box_xyxy_px)
    if tint is None:
        return picture
    alpha = picture.getchannel("A")
    shades = ImageOps.autocontrast(picture.convert("L"), mask=alpha.point(lambda value: 255 if value >= 128 else 0))
    tinted = ImageOps.colorize(shades, black="#181818", mid=TINTS[tint], white="#f4f4f4", midpoint=140)
    tinted.putalpha(alpha)
    return tinted
