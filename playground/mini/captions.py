"""Captions of scenes, in several styles, and the prompts they answer.

A caption mentions the largest objects of a scene and neglects the others, as captions of real pictures do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from playground.mini.backgrounds import label_phrase
from playground.mini.scenes import Scene
from playground.mini.wording import (
    capitalised,
    choose,
    counted,
    groups_by_name,
    is_clearly_left_of,
    listed,
    place_phrase,
    shuffled,
    third_of_width,
)

CAPTION_PROMPTS = (
    "Say briefly what the picture shows.",
    "What can be seen here? Keep it short.",
    "Give this image a short caption.",
    "Sum up the visual content in one sentence.",
    "Caption this picture.",
    "What is in this photo? One sentence is enough.",
)

CaptionStyle = Callable[[Scene, np.random.Generator], str]


def caption_prompt(rng: np.random.Generator) -> str:
    """A request for a caption with the image token before or after it, as LLaVA's stage 1 has it."""
    prompt = choose(rng, CAPTION_PROMPTS)
    return f"<image>\n{prompt}" if rng.random() < 0.5 else f"{prompt}\n<image>"


def write_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of `scene.captioned`: plain in the simple style, one of several manners in the full one.

    Where no object may be mentioned, it names the background.
    """
    seen = replace(scene, objects=scene.captioned)
    if not seen.objects or scene.style == "simple":
        return _plain(seen, rng)
    return choose(rng, FULL_STYLES)(seen, rng)


def _plain(scene: Scene, rng: np.random.Generator) -> str:
    """ "A picture of a dog and two cats." """
    objects = [counted(group) for group in groups_by_name(scene.told).values()]
    things = listed(shuffled(rng, objects or [label_phrase(region.label) for region in scene.background]))
    frame = choose(rng, ("{}", "a picture of {}", "an image with {}", "the picture shows {}"))
    return capitalised(frame.format(things)) + "."


def _short(scene: Scene, rng: np.random.Generator) -> str:
    """ "A dog and two cats in a meadow." """
    return _things_with(scene, rng, colours=False)


def _coloured(scene: Scene, rng: np.random.Generator) -> str:
    """ "A red car and a brown horse on a beach." """
    return _things_with(scene, rng, colours=True)


def _things_with(scene: Scene, rng: np.random.Generator, *, colours: bool) -> str:
    groups = shuffled(rng, list(groups_by_name(scene.told).values()))
    things = listed([counted(group, colours=colours) for group in groups])
    frame = choose(rng, ("{} {}", "a photo of {} {}", "{} can be seen {}"))
    return capitalised(frame.format(things, scene.setting.place)) + "."


def _with_places(scene: Scene, rng: np.random.Generator) -> str:
    """ "On the left there is a dog, in the middle a car and on the right two trees." """
    parts: list[str] = []
    for third in ("left", "middle", "right"):
        objects = [item for item in scene.told if third_of_width(scene, item) == third]
        if objects:
            things = listed([counted(group, colours=rng.random() < 0.3) for group in groups_by_name(objects).values()])
            verb = " there is" if not parts and len(objects) == 1 else " there are" if not parts else ""
            parts.append(f"{place_phrase(scene, objects[0])}{verb} {things}")
    return capitalised("; ".join(parts)) + "."


def _with_background(scene: Scene, rng: np.random.Generator) -> str:
    """ "A dog and a car. Behind them are sky and mountains, below is grass." """
    things = listed([counted(group) for group in groups_by_name(scene.told).values()])
    labels = [label_phrase(region.label) for region in scene.background]
    if not labels:
        return _short(scene, rng)
    ending = choose(rng, ("The background shows {}.", "One also sees {}.", "All around: {}."))
    return f"{capitalised(things)}. {ending.format(listed(labels))}"


def _with_relation(scene: Scene, rng: np.random.Generator) -> str:
    """ "A dog to the left of a car, in a meadow." """
    groups = groups_by_name(scene.told)
    single = [group[0] for group in groups.values() if len(group) == 1]
    pairs = [(a, b) for a in single for b in single if a is not b and is_clearly_left_of(scene, a, b)]
    if not pairs:
        return _short(scene, rng)
    left, right = choose(rng, pairs)
    if rng.random() < 0.5:
        sentence = f"{left.sprite.with_article} to the left of {right.sprite.with_article}"
    else:
        sentence = f"{right.sprite.with_article} to the right of {left.sprite.with_article}"
    others = [counted(group) for group in groups.values() if group[0] is not left and group[0] is not right]
    ending = f", with {listed(others)} nearby" if others else ""
    return f"{capitalised(sentence)} {scene.setting.place}{ending}."


def describe_at_length(scene: Scene, rng: np.random.Generator) -> str:
    """Several sentences: the place, every thing with its colour and where it is, and the background."""
    sentences = [f"The picture was taken {scene.setting.place}."]
    groups = groups_by_name(scene.told)
    for group in groups.values():
        if len(group) == 1:
            sentences.append(f"There is {counted(group, colours=True)} {place_phrase(scene, group[0])}.")
        else:
            sentences.append(f"There are {counted(group, colours=True)}.")
    partly_hidden = [group[0] for group in groups.values() if len(group) == 1 and group[0].hidden > 0.15]
    if partly_hidden:
        sentences.append(f"The {choose(rng, partly_hidden).sprite.name} can be seen only in part.")
    if scene.background:
        sentences.append(f"The background shows {listed([label_phrase(region.label) for region in scene.background])}.")
    return " ".join(sentences)


FULL_STYLES: tuple[CaptionStyle, ...] = (
    _short,
    _coloured,
    _with_places,
    _with_background,
    _with_relation,
    describe_at_length,
)
