"""Composes one scene: sprites on a background, with exact visible masks, from (seed, split, style, index) alone.

Two styles, in which things may occur several times and half of the names are tinted at random:
- `simple`: two to four things of the smaller set on one surface, apart from each other.
- `full`: one to seven things of all names, in many sizes and partly hidden, in a setting of several surfaces.

A pixel belongs to the topmost sprite whose alpha is at least one half there, else to the background. A sprite of which
others or the picture's edge would hide more than `MOST_HIDDEN` is left out before anything is drawn, so whatever is in
the picture is also in the annotations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from playground.mini.backgrounds import SURFACES, Background, Setting, paint_setting
from playground.mini.sprites import TINTS, Sprite, load_sprites, sprite_picture

STYLES = ("simple", "full")
SPLITS = ("train", "heldout")
SIMPLE_SIZE_WH = (224, 224)
FULL_SIZES_WH = ((224, 224), (256, 192), (288, 192), (192, 256), (320, 224), (240, 240), (224, 288))
MOST_HIDDEN = 0.55
LEAST_BACKGROUND = 0.02
"""Bands of which less than this part of the picture can be seen are not annotated (they stay in the picture)."""
MOST_MENTIONS = 2
"""Captions mention one name or two."""

_OPAQUE = 128
_REPEATED = 0.3
_TINTED = 0.5


@dataclass(frozen=True)
class SceneObject:
    """One sprite in the picture."""

    sprite: Sprite  # what it is
    mask: np.ndarray  # bool `[height, width]`, the pixels where it can be seen
    box_xyxy_px: tuple[int, int, int, int]  # tight box of the mask, pixel edges
    hidden: float  # part of the sprite's own area that cannot be seen, 0..`MOST_HIDDEN`
    colour: str | None  # its tint, None for the sprite's own colours. All objects of a name have the same

    @property
    def area_px(self) -> int:
        """Number of visible pixels."""
        return int(self.mask.sum())

    @property
    def centre_xy_px(self) -> tuple[float, float]:
        """Middle of the box."""
        left, top, right, bottom = self.box_xyxy_px
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class BackgroundRegion:
    """One labelled part of the background: its label, visible mask (bool `[height, width]`) and tight box."""

    label: str
    mask: np.ndarray
    box_xyxy_px: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture and all that is in it."""

    index: int  # position in its split
    style: str  # `simple` or `full`
    picture: np.ndarray  # uint8 `[height, width, 3]`
    objects: tuple[SceneObject, ...]  # from left to right
    background: tuple[BackgroundRegion, ...]  # labelled parts, from top to bottom
    setting: Setting  # what the background shows
    mentions: int  # number of names that its captions mention
    held_out: frozenset[str]  # names that no text mentions

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.picture.shape[:2]
        return width, height

    @property
    def told(self) -> tuple[SceneObject, ...]:
        """The objects that texts may mention."""
        return tuple(item for item in self.objects if item.sprite.name not in self.held_out)

    @property
    def captioned(self) -> tuple[SceneObject, ...]:
        """The objects that captions mention: those of the largest names among `told`."""
        by_area = sorted(self.told, key=lambda item: -item.area_px)
        names = list(dict.fromkeys(item.sprite.name for item in by_area))[: self.mentions]
        return tuple(item for item in self.told if item.sprite.name in names)


@dataclass(frozen=True)
class Placement:
    """A sprite at its place: RGBA picture, its top left corner, which may lie outside the scene, and its tint."""

    sprite: Sprite
    picture: Image.Image
    left: int
    top: int
    colour: str | None = None

    @property
    def bottom(self) -> int:
        """Row below the sprite's last one."""
        return self.top + self.picture.height

    def solid_mask(self, shape_hw: tuple[int, int]) -> np.ndarray:
        """Where the sprite is opaque, bool `[height, width]`, cut at the scene's edges."""
        canvas = Image.new("L", (shape_hw[1], shape_hw[0]))
        canvas.paste(self.picture.getchannel("A"), (self.left, self.top))
        return np.asarray(canvas) >= _OPAQUE

    def solid_area(self) -> int:
        """Opaque pixels of the whole sprite."""
        return int((np.asarray(self.picture.getchannel("A")) >= _OPAQUE).sum())


def scene_rng(seed: int, split: str, style: str, index: int) -> np.random.Generator:
    """The generator of one scene. Splits and styles draw from streams of their own, so they never share a scene."""
    return np.random.default_rng([seed, SPLITS.index(split), STYLES.index(style), index])


def compose_scene(
    seed: int,
    split: str,
    style: str,
    index: int,
    size_wh: tuple[int, int] | None = None,
    held_out: frozenset[str] = frozenset(),
) -> tuple[Scene, np.random.Generator]:
    """Scene `index` of a split, and its generator, from which the texts about the scene are drawn next.

    Without `size_wh` pictures have 224 x 224 pixels (simple) or one of several shapes (full). They do not depend on the
    names that are held out.
    """
    rng = scene_rng(seed, split, style, index)
    if style == "simple":
        width, height = size_wh or SIMPLE_SIZE_WH
        background = paint_setting(rng, (height, width), SURFACES)
        placements = _place_apart(rng, (height, width))
    else:
        width, height = size_wh or FULL_SIZES_WH[int(rng.integers(len(FULL_SIZES_WH)))]
        background = paint_setting(rng, (height, width))
        placements = _place_in_depth(rng, (height, width), background)
    picture, objects, regions = assemble(background, placements, shadows=style == "full")
    mentions = int(rng.integers(1, MOST_MENTIONS + 1))
    return Scene(index, style, picture, objects, regions, background.setting, mentions, held_out), rng


def _draw_names(rng: np.random.Generator, sprites: tuple[Sprite, ...], count: int) -> list[tuple[Sprite, str | None]]:
    """Sprites with their tints, some several times. Names, tints and numbers are independent of each other."""
    chosen: list[tuple[Sprite, str | None]] = []
    for i in rng.choice(len(sprites), count, replace=False):
        repeats = int(rng.integers(2, 5)) if rng.random() < _REPEATED else 1
        tint = list(TINTS)[int(rng.integers(len(TINTS)))] if rng.random() < _TINTED else None
        chosen += [(sprites[i], tint)] * min(repeats, count - len(chosen))
    return chosen


def _scaled(sprite: Sprite, colour: str | None, longest_px: float) -> Image.Image:
    picture = sprite_picture(sprite, colour)
    scale = longest_px / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _place_apart(rng: np.random.Generator, shape_hw: tuple[int, int]) -> list[Placement]:
    """Two to four sprites whose boxes do not touch; sizes are 0.29 to 0.5 of the shorter side."""
    height, width = shape_hw
    placements: list[Placement] = []
    for sprite, colour in _draw_names(rng, load_sprites(simple_only=True), int(rng.integers(2, 5))):
        longest = rng.uniform(0.29, 0.5) * min(shape_hw)
        for attempt in range(200):
            if attempt % 10 == 0:  # crowded pictures leave no room for a large sprite: it shrinks a little
                picture = _scaled(sprite, colour, longest * 0.93 ** (attempt // 10))
            left, top = _draw_start(rng, width, picture.width), _draw_start(rng, height, picture.height)
            candidate = Placement(sprite, picture, left, top, colour)
            if not any(_boxes_touch(candidate, other) for other in placements):
                placements.append(candidate)
                break
    return placements


def _draw_start(rng: np.random.Generator, length: int, extent: int) -> int:
    """First pixel of a sprite. The middles of those that find room lie in each third about equally often."""
    third = (0, 1, 1, 2)[int(rng.integers(4))]  # in the middle sprites are more often in each other's way
    middle = rng.uniform(max(extent / 2, third * length / 3), min(length - extent / 2, (third + 1) * length / 3))
    return round(middle - extent / 2)


def _boxes_touch(first: Placement, second: Placement) -> bool:
    return (
        first.left < second.left + second.picture.width
        and second.left < first.left + first.picture.width
        and first.top < second.bottom
        and second.top < first.bottom
    )


def _place_in_depth(rng: np.random.Generator, shape_hw: tuple[int, int], background: Background) -> list[Placement]:
    """One to seven sprites on the ground, in the water or in the air; nearer ones are larger, lower and in front."""
    chosen = _draw_names(rng, load_sprites(), int(rng.integers(1, 8)))
    placements = [_place_in_setting(rng, sprite, colour, shape_hw, background) for sprite, colour in chosen]
    placements.sort(key=lambda placement: placement.bottom)
    return _without_hidden(placements, shape_hw)


def _place_in_setting(
    rng: np.random.Generator, sprite: Sprite, colour: str | None, shape_hw: tuple[int, int], background: Background
) -> Placement:
    height, width = shape_hw
    water = background.masks.get("water")
    if sprite.habitat == "air" and "sky" in background.masks:
        nearness = rng.uniform(0.0, 0.6)
        bottom = rng.uniform(0.3, 0.95) * background.ground_top
    elif sprite.habitat == "water" and water is not None and water.any():
        nearness = rng.uniform(0.1, 0.5)
        rows = np.flatnonzero(water.any(axis=1))
        bottom = rng.uniform(rows[0] + 0.4 * (rows[-1] - rows[0]), rows[-1])
    else:
        nearness = rng.uniform(0.0, 1.0)
        bottom = background.ground_top + (0.12 + 0.86 * nearness) * (height - background.ground_top)
    longest = (0.2 + 0.3 * nearness) * rng.uniform(0.85, 1.2) * min(shape_hw)
    picture = _varied(rng, _scaled(sprite, colour, longest))
    left = round(rng.uniform(-0.12 * picture.width, width - 0.88 * picture.width))
    top = max(round(bottom) - picture.height, -picture.height // 8)
    return Placement(sprite, picture, left, top, colour)


def _varied(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Mirrored, slightly turned, lighter or darker."""
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        picture = picture.rotate(rng.uniform(-14, 14), Image.Resampling.BICUBIC, expand=True)
        picture = picture.crop(picture.getbbox())
    alpha = picture.getchannel("A")
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.82, 1.1))
    picture.putalpha(alpha)
    return picture


def _without_hidden(placements: list[Placement], shape_hw: tuple[int, int]) -> list[Placement]:
    """Drops what would be hidden too much, from front to back: what is dropped hides nothing."""
    kept: list[Placement] = []
    taken = np.zeros(shape_hw, dtype=bool)
    for placement in reversed(placements):
        mask = placement.solid_mask(shape_hw)
        visible = int((mask & ~taken).sum())
        if visible >= (1 - MOST_HIDDEN) * placement.solid_area():
            kept.append(placement)
            taken |= mask
    return kept[::-1]


def assemble(
    background: Background, placements: list[Placement], *, shadows: bool
) -> tuple[np.ndarray, tuple[SceneObject, ...], tuple[BackgroundRegion, ...]]:
    """Draws the sprites from back to front and reads the visible masks off from front to back."""
    shape_hw = background.picture.shape[:2]
    canvas = Image.fromarray(background.picture)
    for placement in placements:
        if shadows and placement.sprite.habitat != "air":
            _draw_shadow(canvas, placement)
        canvas.paste(placement.picture, (placement.left, placement.top), placement.picture)

    taken = np.zeros(shape_hw, dtype=bool)
    objects = []
    for placement in reversed(placements):
        mask = placement.solid_mask(shape_hw) & ~taken
        taken |= mask
        hidden = 1 - mask.sum() / placement.solid_area()
        objects.append(SceneObject(placement.sprite, mask, tight_box(mask), float(hidden), placement.colour))
    objects.sort(key=lambda item: item.centre_xy_px)

    regions = []
    for label, band in background.masks.items():
        mask = band & ~taken
        if mask.mean() >= LEAST_BACKGROUND:
            regions.append(BackgroundRegion(label, mask, tight_box(mask)))
    return np.asarray(canvas), tuple(objects), tuple(regions)


def _draw_shadow(canvas: Image.Image, placement: Placement) -> None:
    """A soft dark ellipse under the sprite. It belongs to whatever it falls on, never to the sprite."""
    width, height = placement.picture.width, max(4, placement.picture.height // 7)
    margin = height
    shadow = Image.new("L", (width + 2 * margin, height + 2 * margin))
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None]
    ellipse = Image.fromarray((120 * np.clip(1.2 - (x**2 + y**2), 0, 1)).astype(np.uint8))
    shadow.paste(ellipse, (margin, margin))
    shadow = shadow.filter(ImageFilter.BoxBlur(height / 3))
    canvas.paste((12, 14, 18), (placement.left - margin, placement.bottom - height // 2 - margin), shadow)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Smallest box around the true pixels of `mask` as left, top, right, bottom (pixel edges)."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1
