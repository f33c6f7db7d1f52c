"""Surfaces that fill backgrounds: sky, grass, water, brick, wood ..., painted with value noise and gradients.

Each material is a function `(rng, shape_hw) -> float32 [height, width, 3]`, colours 0..255 (not clipped). All
randomness comes from `rng`, so the same generator state paints the same surface.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

Material = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
Colour = tuple[float, float, float]


def value_noise(
    rng: np.random.Generator, shape_hw: tuple[int, int], cell_px: float, *, octaves: int = 3, stretch: float = 1.0
) -> np.ndarray:
    """Smooth noise, `[height, width]` float32, mean about 0.5, range about 0..1.

    The coarsest blobs are `cell_px` high; each further octave is twice as fine and half as strong. Blobs are `stretch`
    times as wide as high.
    """
    height, width = shape_hw
    total = np.zeros(shape_hw, dtype=np.float32)
    strength, sum_of_strengths = 1.0, 0.0
    for octave in range(octaves):
        cell = max(cell_px / 2**octave, 1.0)
        rows, cols = int(height / cell) + 2, int(width / (cell * stretch)) + 2
        grid = Image.fromarray(rng.random((rows, cols), dtype=np.float32))
        total += strength * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
        sum_of_strengths += strength
        strength /= 2
    return total / sum_of_strengths


def _mix(first: Colour, second: Colour, share: np.ndarray) -> np.ndarray:
    """Colour from `first` (share 0) to `second` (share 1): `[h, w]` or `[h, 1]` -> `[h, w or 1, 3]`."""
    share = share[..., None].astype(np.float32)
    start, end = np.array(first, dtype=np.float32), np.array(second, dtype=np.float32)
    return start + (end - start) * share


def _contrast(noise: np.ndarray, strength: float) -> np.ndarray:
    return np.clip((noise - 0.5) * strength + 0.5, 0, 1)


def _grain(rng: np.random.Generator, shape_hw: tuple[int, int], strength: float) -> np.ndarray:
    return (rng.random((*shape_hw, 1), dtype=np.float32) - 0.5) * strength


def _down(shape_hw: tuple[int, int]) -> np.ndarray:
    """0 at the top edge to 1 at the bottom, `[height, 1]`."""
    return np.linspace(0, 1, shape_hw[0], dtype=np.float32)[:, None]


def _pick(rng: np.random.Generator, options: list[tuple[Colour, Colour]]) -> tuple[Colour, Colour]:
    return options[int(rng.integers(len(options)))]


def sky(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Clear, cloudy or evening sky."""
    top, low = _pick(
        rng,
        [
            ((70, 130, 210), (190, 220, 245)),
            ((95, 155, 225), (215, 232, 246)),
            ((120, 140, 165), (205, 212, 220)),
            ((85, 100, 160), (250, 190, 140)),
        ],
    )
    picture = np.broadcast_to(_mix(top, low, _down(shape_hw) ** 0.8), (*shape_hw, 3))
    clouds = _contrast(value_noise(rng, shape_hw, shape_hw[0] / 4, octaves=4, stretch=2.2) - 0.08, 3.5)[..., None]
    return picture + (np.float32(248) - picture) * clouds * np.float32(rng.uniform(0.1, 0.9))


def grass(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Meadow, coarser towards the bottom."""
    dark, light = _pick(
        rng, [((52, 95, 30), (128, 172, 62)), ((70, 105, 40), (160, 180, 80)), ((35, 85, 40), (95, 155, 70))]
    )
    blades = value_noise(rng, shape_hw, 5, octaves=2, stretch=0.35)
    patches = value_noise(rng, shape_hw, 40, octaves=2, stretch=2)
    return _mix(dark, light, _contrast(0.6 * blades + 0.4 * patches, 2.2)) * (1.05 - 0.15 * _down(shape_hw)[..., None])


def water(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Lake or sea with flat waves and highlights."""
    deep, light = _pick(
        rng, [((20, 70, 120), (90, 155, 190)), ((20, 95, 110), (110, 185, 185)), ((45, 75, 105), (130, 160, 180))]
    )
    waves = value_noise(rng, shape_hw, 7, octaves=3, stretch=5)
    picture = _mix(deep, light, _contrast(waves, 1.8))
    return picture + 90 * _contrast(waves - 0.28, 6)[..., None]


def sand(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Sand with ripples and grain."""
    dark, light = _pick(
        rng, [((190, 155, 105), (238, 214, 165)), ((205, 170, 120), (245, 225, 185)), ((175, 135, 90), (225, 190, 140))]
    )
    dunes = value_noise(rng, shape_hw, 45, octaves=3, stretch=2.5)
    ripples = 0.5 + 0.5 * np.sin((_down(shape_hw) * shape_hw[0] / 3.2 + dunes * 26).astype(np.float32))
    return _mix(dark, light, _contrast(0.75 * dunes + 0.25 * ripples, 1.5)) + _grain(rng, shape_hw, 22)


def snow(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Snow with bluish hollows."""
    drifts = value_noise(rng, shape_hw, 50, octaves=3, stretch=2.5)
    return _mix((198, 212, 232), (250, 252, 255), _contrast(drifts, 2.0)) + _grain(rng, shape_hw, 10)


def mountains(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Distant rock, hazy towards its foot."""
    dark, light = _pick(
        rng, [((75, 80, 105), (150, 155, 175)), ((85, 75, 70), (165, 150, 140)), ((60, 80, 90), (135, 155, 165))]
    )
    ridges = np.abs(value_noise(rng, shape_hw, 28, octaves=4, stretch=0.8) - 0.5) * 3.2
    return _mix(dark, light, np.clip(0.85 * ridges + 0.2 * _down(shape_hw), 0, 1))


def forest(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Tree tops from afar."""
    dark, light = _pick(
        rng, [((18, 45, 25), (75, 115, 55)), ((25, 50, 30), (95, 125, 50)), ((60, 50, 25), (175, 120, 50))]
    )
    return _mix(dark, light, _contrast(value_noise(rng, shape_hw, 11, octaves=3, stretch=0.8), 2.4))


def road(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Asphalt with a dashed line along the road."""
    patches = value_noise(rng, shape_hw, 40, octaves=2, stretch=3)
    picture = _mix((72, 74, 78), (118, 118, 120), patches) + _grain(rng, shape_hw, 34)
    height, width = shape_hw
    line = int(height * rng.uniform(0.3, 0.5))
    thickness = max(3, height // 22)
    dashes = (np.arange(width) + int(rng.integers(48))) % 48 < 28
    picture[line : line + thickness, dashes] = (225, 222, 205)
    return picture


def plaster_wall(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Painted wall, sometimes with a striped wallpaper."""
    base = np.array(rng.uniform(150, 225, 3), dtype=np.float32)
    light = 1 + 0.12 * (value_noise(rng, shape_hw, 90, octaves=2) - 0.5)[..., None]
    picture = base * light + _grain(rng, shape_hw, 8)
    if rng.random() < 0.4:
        period = int(rng.integers(14, 34))
        stripes = (np.arange(shape_hw[1]) // period % 2)[None, :, None]
        picture = picture - stripes * np.float32(rng.uniform(10, 26))
    return picture


def brick_wall(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Bricks with light mortar."""
    height, width = shape_hw
    brick_height, brick_width = 12, 28
    row = np.arange(height)[:, None] // brick_height
    shifted = np.arange(width)[None] + (row % 2) * (brick_width // 2)
    col = shifted // brick_width
    tones = rng.random((height // brick_height + 1, width // brick_width + 2), dtype=np.float32)
    dark, light = _pick(
        rng, [((135, 60, 45), (190, 105, 80)), ((150, 110, 85), (200, 165, 135)), ((110, 75, 70), (165, 115, 100))]
    )
    picture = _mix(dark, light, tones[row, col]) + _grain(rng, shape_hw, 26)
    mortar = (np.arange(height)[:, None] % brick_height < 2) | (shifted % brick_width < 2)
    picture[mortar] = (200, 194, 184)
    return picture


def planks(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Wooden boards."""
    height, width = shape_hw
    board = int(rng.integers(18, 30))
    row = np.arange(height) // board
    dark, light = _pick(
        rng, [((120, 78, 45), (190, 140, 92)), ((95, 62, 40), (150, 108, 72)), ((165, 130, 90), (222, 190, 148))]
    )
    fibres = value_noise(rng, shape_hw, 3, octaves=2, stretch=14)
    tone = rng.random(int(row[-1]) + 1, dtype=np.float32)[row][:, None]
    picture = _mix(dark, light, 0.6 * fibres + 0.4 * tone)
    picture[np.arange(height) % board < 1] *= 0.6
    joints = rng.integers(0, width, int(row[-1]) + 1)[row]
    picture[np.arange(height), joints] *= 0.65
    return picture


def tiles(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """Two-coloured floor tiles."""
    height, width = shape_hw
    side = int(rng.integers(20, 36))
    row, col = np.arange(height)[:, None] // side, np.arange(width)[None] // side
    light = np.array(rng.uniform(190, 235, 3), dtype=np.float32)
    shade = np.where((row + col) % 2 == 0, 1.0, rng.uniform(0.6, 0.85)).astype(np.float32)[..., None]
    return light * shade + 14 * (value_noise(rng, shape_hw, 30, octaves=2)[..., None] - 0.5) + _grain(rng, shape_hw, 6)


def carpet(rng: np.random.Generator, shape_hw: tuple[int, int]) -> np.ndarray:
    """One-coloured carpet with a woven surface."""
    base = np.array(rng.uniform(70, 190, 3), dtype=np.float32)
    weave = np.sin(np.arange(shape_hw[0]) * 1.9)[:, None] * np.sin(np.arange(shape_hw[1]) * 1.9)[None]
    tone = 1 + 0.10 * weave + 0.18 * (value_noise(rng, shape_hw, 35, octaves=2) - 0.5)
    return base * tone.astype(np.float32)[..., None] + _grain(rng, shape_hw, 26)
