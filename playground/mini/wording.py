"""How English speaks of what is in a scene: numbers, lists, articles, places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from playground.mini.scenes import Scene, SceneObject

Item = TypeVar("Item")

THIRDS = ("left", "middle", "right")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def choose(rng: np.random.Generator, options: Sequence[Item]) -> Item:
    """One of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def shuffled(rng: np.random.Generator, items: Sequence[Item]) -> list[Item]:
    """The items in random order."""
    return [items[i] for i in rng.permutation(len(items))]


def number_word(count: int) -> str:
    """0..10 in words ("no" for 0), beyond in digits."""
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def article(phrase: str) -> str:
    """ "a" or "an" for a phrase that begins with a colour or another plain word."""
    return "an" if phrase[0] in "aeiou" else "a"


def listed(items: Sequence[str], conjunction: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {conjunction} {items[-1]}"


def capitalised(sentence: str) -> str:
    """First letter upper case, the rest as it is."""
    return sentence[:1].upper() + sentence[1:]


def groups_by_name(objects: Sequence[SceneObject]) -> dict[str, list[SceneObject]]:
    """Objects by name, in the order in which the names first occur."""
    groups: dict[str, list[SceneObject]] = {}
    for item in objects:
        groups.setdefault(item.sprite.name, []).append(item)
    return groups


def coloured_name(item: SceneObject) -> str:
    """ "red car"; only "car" where it is not tinted."""
    return f"{item.colour} {item.sprite.name}" if item.colour else item.sprite.name


def counted(group: Sequence[SceneObject], *, colours: bool = False) -> str:
    """ "a dog", "two dogs", with `colours` "a red car", "two red cars"."""
    sprite = group[0].sprite
    colour = f"{group[0].colour} " if colours and group[0].colour else ""
    if len(group) > 1:
        return f"{number_word(len(group))} {colour}{sprite.plural}"
    return f"{article(colour)} {colour}{sprite.name}" if colour else sprite.with_article


def cell_of_nine(scene: Scene, item: SceneObject) -> tuple[int, int]:
    """Column and row, 0 to 2 each, of the middle of the object's box."""
    column, row = (min(2, int(3 * at / length)) for at, length in zip(item.centre_xy_px, scene.size_wh, strict=True))
    return column, row


def is_clearly_in_its_third(scene: Scene, item: SceneObject, axis: int = 0) -> bool:
    """Whether the middle of the object's box keeps away from the lines between the thirds of the width (axis 0)."""
    at, length = item.centre_xy_px[axis], scene.size_wh[axis]
    return all(abs(at - line * length / 3) >= 0.05 * length for line in (1, 2))


def third_of_width(scene: Scene, item: SceneObject) -> str:
    """ "left", "middle" or "right" by the middle of the object's box."""
    return THIRDS[cell_of_nine(scene, item)[0]]


def place_phrase(scene: Scene, item: SceneObject) -> str:
    """ "on the left", "in the middle", "on the right"."""
    third = third_of_width(scene, item)
    return "in the middle" if third == "middle" else f"on the {third}"


def is_clearly_left_of(scene: Scene, first: SceneObject, second: SceneObject) -> bool:
    """Whether nobody would dispute that `first` is to the left of `second`: the boxes overlap by a fifth at most."""
    overlap = first.box_xyxy_px[2] - second.box_xyxy_px[0]
    narrower = min(item.box_xyxy_px[2] - item.box_xyxy_px[0] for item in (first, second))
    apart = second.centre_xy_px[0] - first.centre_xy_px[0]
    return overlap <= 0.2 * narrower and apart >= 0.08 * scene.size_wh[0]
