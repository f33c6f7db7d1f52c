"""Backgrounds of scenes, made of labelled bands: settings such as a meadow or a room, or a single surface."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from playground.mini import materials
from playground.mini.materials import Material, value_noise


@dataclass(frozen=True)
class Band:
    """One surface of a setting, from its upper edge down to the next band's."""

    label: str  # what a person would call it
    material: Material  # paints it
    share: tuple[float, float]  # least and greatest part of the picture's height
    roughness: float = 0.0  # height of the bumps of its upper edge, as a part of the picture's height
    chance: float = 1.0  # probability that the band is there at all


@dataclass(frozen=True)
class Setting:
    """A kind of place: how a sentence names it, and its bands from top to bottom. The last band is the ground."""

    name: str
    place: str
    bands: tuple[Band, ...]


_SKY = Band("sky", materials.sky, (0.35, 0.55))
_FAR_MOUNTAINS = Band("mountains", materials.mountains, (0.12, 0.25), roughness=0.22, chance=0.45)
_FAR_FOREST = Band("forest", materials.forest, (0.10, 0.18), roughness=0.08, chance=0.4)
_FAR_WATER = Band("water", materials.water, (0.18, 0.3))
_GRASS = Band("grass", materials.grass, (0.4, 0.6), roughness=0.06)
_GRASS_STRIP = Band("grass", materials.grass, (0.12, 0.2), roughness=0.04)
_SAND = Band("sand", materials.sand, (0.4, 0.6), roughness=0.07)
_SNOW = Band("snow", materials.snow, (0.4, 0.6), roughness=0.06)
_ROAD = Band("road", materials.road, (0.4, 0.5))
_PAINTED_WALL = Band("wall", materials.plaster_wall, (0.4, 0.55))
_BRICK_WALL = Band("wall", materials.brick_wall, (0.4, 0.55))

SETTINGS = (
    Setting("meadow", "in a meadow", (_SKY, _FAR_MOUNTAINS, _FAR_FOREST, _GRASS)),
    Setting("lake", "by a lake", (_SKY, _FAR_FOREST, _FAR_WATER, _GRASS)),
    Setting("beach", "on a beach", (_SKY, _FAR_WATER, _SAND)),
    Setting("desert", "in the desert", (_SKY, _FAR_MOUNTAINS, _SAND)),
    Setting("snow", "in the snow", (_SKY, _FAR_MOUNTAINS, _FAR_FOREST, _SNOW)),
    Setting("street", "on a street", (_BRICK_WALL, _ROAD)),
    Setting("country road", "on a country road", (_SKY, _FAR_FOREST, _GRASS_STRIP, _ROAD)),
    Setting("kitchen", "in a kitchen", (_PAINTED_WALL, Band("floor", materials.tiles, (0.4, 0.5)))),
    Setting("room", "in a room", (_PAINTED_WALL, Band("floor", materials.planks, (0.4, 0.5)))),
    Setting("hall", "in a hall", (_BRICK_WALL, Band("carpet", materials.carpet, (0.4, 0.5)))),
)


def _surface(label: str, place: str, material: Material) -> Setting:
    return Setting(label, place, (Band(label, material, (1.0, 1.0)),))


SURFACES = (
    _surface("grass field", "on a grass field", materials.grass),
    _surface("sand", "on sand", materials.sand),
    _surface("snow", "in the snow", materials.snow),
    _surface("water", "on water", materials.water),
    _surface("forest", "in front of a forest", materials.forest),
    _surface("brick wall", "in front of a brick wall", materials.brick_wall),
    _surface("painted wall", "in front of a painted wall", materials.plaster_wall),
    _surface("wooden floor", "on a wooden floor", materials.planks),
    _surface("tiled floor", "on a tiled floor", materials.tiles),
    _surface("carpet", "on a carpet", materials.carpet),
)
"""Backgrounds of the simple style: one surface all over the picture, with a label of one to three tokens."""

_UNCOUNTABLE = frozenset({"grass", "mountains", "sand", "sky", "snow", "water"})


def labels_of(settings: tuple[Setting, ...]) -> tuple[str, ...]:
    """All labels that such backgrounds have, sorted."""
    return tuple(sorted({band.label for setting in settings for band in setting.bands}))


BACKGROUND_LABELS = labels_of(SETTINGS + SURFACES)


def label_phrase(label: str) -> str:
    """A background label as a sentence introduces it: "a road", but "water"."""
    return label if label in _UNCOUNTABLE else f"a {label}"


@dataclass(frozen=True)
class Background:
    """A painted background."""

    picture: np.ndarray  # uint8 `[height, width, 3]`
    setting: Setting  # what it shows
    masks: dict[str, np.ndarray]  # bool `[height, width]` by label, from top to bottom; they share no pixel
    ground_top: int  # height at which the ground begins, pixels (mean over the width)


def paint_setting(
    rng: np.random.Generator, shape_hw: tuple[int, int], settings: tuple[Setting, ...] = SETTINGS
) -> Background:
    """A background with labelled bands, of one of `settings`."""
    height, width = shape_hw
    setting = settings[int(rng.integers(len(settings)))]
    bands = [band for band in setting.bands if rng.random() < band.chance]
    shares = np.array([rng.uniform(*band.share) for band in bands])
    tops = np.concatenate([[0.0], np.cumsum(shares / shares.sum())[:-1]]) * height  # [bands]

    picture = np.zeros((height, width, 3), dtype=np.float32)
    masks: dict[str, np.ndarray] = {}
    rows = np.arange(height)[:, None]  # [height, 1]
    for index, band in enumerate(bands):
        edge = np.full(width, tops[index])
        if index and band.roughness:
            bumps = value_noise(rng, (1, width), width / 5, octaves=3)[0]  # [width]
            edge = edge - (bumps - 0.4) * 2 * band.roughness * height
        below = rows >= edge[None]  # [height, width]
        top = max(0, int(edge.min()))
        surface = band.material(rng, (height - top, width))  # [height - top, width, 3]
        picture[top:] = np.where(below[top:, :, None], surface, picture[top:])
        for label in masks:
            masks[label] = masks[label] & ~below
        masks[band.label] = below
    return Background(_finish(rng, picture), setting, masks, int(tops[-1]))


def _finish(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Uneven light over the whole picture and rounding to bytes."""
    height, width = picture.shape[:2]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    tilt_x, tilt_y = rng.uniform(-0.08, 0.08, 2)
    light = 1 + tilt_x * x + tilt_y * y - 0.06 * (x**2 + y**2)
    return np.clip(picture * light[..., None], 0, 255).astype(np.uint8)
