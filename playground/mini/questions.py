"""Questions with exact answers, referring expressions and conversations about a scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from patch_aligned.cells import boxes_xyxy_to_square01
from playground.mini.backgrounds import SETTINGS, SURFACES, label_phrase, labels_of
from playground.mini.captions import describe_at_length, write_caption
from playground.mini.scenes import Scene, SceneObject
from playground.mini.sprites import load_sprites
from playground.mini.wording import (
    capitalised,
    choose,
    coloured_name,
    counted,
    groups_by_name,
    is_clearly_in_its_third,
    is_clearly_left_of,
    listed,
    number_word,
    place_phrase,
    shuffled,
    third_of_width,
)

SHORT_ANSWER = "Answer with one word or a short phrase."
BOX_FORMAT = "Give the bounding box as [x1, y1, x2, y2]."
_CATEGORY_NOUNS = {
    "animal": "animal",
    "vehicle": "vehicle",
    "building": "building",
    "instrument": "musical instrument",
    "plant": "plant",
    "tool": "tool",
}


@dataclass(frozen=True)
class Question:
    """A question about a scene with its short answer and the same answer as a sentence."""

    category: str
    text: str
    answer: str
    sentence: str


@dataclass(frozen=True)
class Expression:
    """Words that fit exactly one object of the scene, and the object's position in `scene.objects`."""

    text: str
    object_index: int


def box_text(box_xyxy_px: tuple[int, int, int, int], size_wh: tuple[int, int]) -> str:
    """A box as LLaVA-1.5 speaks it: `[x1, y1, x2, y2]`, 0..1 of the padded square, two decimals."""
    return "[" + ", ".join(f"{value:.2f}" for value in boxes_xyxy_to_square01(box_xyxy_px, size_wh)) + "]"


def ask_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of each category that the scene allows: existence (a yes and a no), count, colour, place, ..."""
    groups = groups_by_name(scene.told)
    questions = [*_existence(scene, groups, rng), _count(groups, rng)] if groups else []
    single = [group[0] for group in groups.values() if len(group) == 1]
    coloured = [item for item in single if item.colour]
    if coloured:
        item = choose(rng, coloured)
        name, colour = item.sprite.name, str(item.colour)
        questions.append(Question("colour", f"What colour is the {name}?", colour, f"The {name} is {colour}."))
    placed = [item for item in single if is_clearly_in_its_third(scene, item)]
    if placed:
        item = choose(rng, placed)
        questions.append(
            Question(
                "position",
                f"Is the {item.sprite.name} on the left, in the middle or on the right?",
                third_of_width(scene, item),
                f"The {item.sprite.name} is {place_phrase(scene, item)}.",
            )
        )
    pairs = [(a, b) for a in single for b in single if a is not b and is_clearly_left_of(scene, a, b)]
    if pairs:
        left, right = choose(rng, pairs)
        first, second, truth = (left, right, "Yes") if rng.random() < 0.5 else (right, left, "No")
        side = "left" if truth == "Yes" else "right"
        questions.append(
            Question(
                "relation",
                f"Is the {first.sprite.name} to the left of the {second.sprite.name}?",
                truth,
                f"{truth}, the {first.sprite.name} is to the {side} of the {second.sprite.name}.",
            )
        )
    if len(scene.objects) == len(single) == 1:
        sprite = single[0].sprite
        questions.append(Question("name", "What is in the picture?", sprite.name, f"It is {sprite.with_article}."))
    if scene.background:
        questions.append(_background(scene, rng))
    return questions


def _existence(scene: Scene, groups: dict[str, list[SceneObject]], rng: np.random.Generator) -> list[Question]:
    group = choose(rng, list(groups.values()))
    present, verb = group[0].sprite, "is" if len(group) == 1 else "are"
    # Asked about in the simple style is only what its scenes can show.
    sprites = load_sprites(simple_only=scene.style == "simple")
    absent = choose(rng, [s for s in sprites if s.name not in groups and s.name not in scene.held_out])
    return [
        Question("existence", f"Is there {sprite.with_article} in the picture?", answer, sentence)
        for sprite, answer, sentence in (
            (present, "Yes", f"Yes, there {verb} {counted(group)}."),
            (absent, "No", f"No, there is no {absent.name}."),
        )
    ]


def _count(groups: dict[str, list[SceneObject]], rng: np.random.Generator) -> Question:
    several = [group for group in groups.values() if len(group) > 1]
    group = choose(rng, several if several and rng.random() < 0.7 else list(groups.values()))
    sprite, count = group[0].sprite, len(group)
    are = "is one" if count == 1 else f"are {number_word(count)}"
    name = sprite.name if count == 1 else sprite.plural
    return Question("count", f"How many {sprite.plural} are there?", str(count), f"There {are} {name}.")


def _background(scene: Scene, rng: np.random.Generator) -> Question:
    labels = [region.label for region in scene.background]
    if rng.random() < 0.5:
        phrase = label_phrase(choose(rng, labels))
        return Question("background", f"Can {phrase} be seen in the picture?", "Yes", f"Yes, one can see {phrase}.")
    # A band too small to be annotated may still be seen, so only labels foreign to the setting are surely absent.
    own = {band.label for band in scene.setting.bands}
    possible = labels_of(SURFACES if scene.style == "simple" else SETTINGS)
    phrase = label_phrase(choose(rng, [label for label in possible if label not in own]))
    return Question("background", f"Can {phrase} be seen in the picture?", "No", f"No, one cannot see {phrase}.")


def refer_to_objects(scene: Scene, rng: np.random.Generator) -> list[Expression]:
    """At most one expression for each object, left out where no words single it out."""
    groups = groups_by_name(scene.told)
    expressions = []
    for index, item in enumerate(scene.objects):
        options = _expressions_for(scene, item, groups) if item.sprite.name in groups else []
        if options:
            expressions.append(Expression(choose(rng, options), index))
    return expressions


def _expressions_for(scene: Scene, item: SceneObject, groups: dict[str, list[SceneObject]]) -> list[str]:
    name, group = item.sprite.name, groups[item.sprite.name]
    if len(group) > 1:
        others = [other for other in group if other is not item]
        if all(is_clearly_left_of(scene, item, other) for other in others):
            return [f"the leftmost {name}", f"the {name} furthest to the left"]
        if all(is_clearly_left_of(scene, other, item) for other in others):
            return [f"the rightmost {name}", f"the {name} furthest to the right"]
        return []
    options = [f"the {name}", f"the {coloured_name(item)}", f"the {name} {place_phrase(scene, item)}"]
    noun = _CATEGORY_NOUNS.get(item.sprite.category)
    if noun and sum(other.sprite.category == item.sprite.category for other in scene.objects) == 1:
        options.append(f"the only {noun} in the picture")
    for other in scene.told:
        if other is not item and len(groups[other.sprite.name]) == 1:
            if is_clearly_left_of(scene, item, other):
                options.append(f"the {name} to the left of the {other.sprite.name}")
            elif is_clearly_left_of(scene, other, item):
                options.append(f"the {name} to the right of the {other.sprite.name}")
    return options


def converse(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """A conversation of two to five rounds about the scene, in LLaVA's format."""
    rounds = [_as_round(question, rng) for question in ask_questions(scene, rng)]
    for expression in refer_to_objects(scene, rng)[:3]:
        item = scene.objects[expression.object_index]
        box = box_text(item.box_xyxy_px, scene.size_wh)
        rounds.append((f"Where is {expression.text}? {BOX_FORMAT}", box))
        rounds.append((f"What is in the region {box}?", f"{capitalised(item.sprite.with_article)}."))
    rounds.append((choose(rng, ("Describe the picture in detail.", "What do you see? Please be thorough.")),
                   describe_at_length(scene, rng)))  # fmt: skip
    rounds.append(("Give the picture a caption.", write_caption(scene, rng)))
    if len(scene.told) == len(scene.objects):
        things = [counted(group) for group in groups_by_name(scene.told).values()]
        rounds.append(("Name all the things in the picture.", f"{capitalised(listed(things))}."))

    chosen = shuffled(rng, rounds)[: int(rng.integers(2, 6))]
    conversation = []
    for position, (question, answer) in enumerate(chosen):
        conversation.append({"from": "human", "value": question if position else f"<image>\n{question}"})
        conversation.append({"from": "gpt", "value": answer})
    return conversation


def _as_round(question: Question, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.5:
        return f"{question.text}\n{SHORT_ANSWER}", question.answer
    return question.text, question.sentence


def converse_without_image(rng: np.random.Generator, held_out: frozenset[str]) -> list[dict[str, str]]:
    """A short conversation about words only: LLaVA's stage 2 mixes such samples with those about images."""
    sprites = [sprite for sprite in load_sprites() if sprite.name not in held_out]
    first, second, third, fourth = (sprites[int(i)] for i in rng.choice(len(sprites), 4, replace=False))
    rounds: list[tuple[str, str]] = [
        (f"What is the plural of {first.name!r}?", f"The plural is {first.plural!r}."),
        (f"Write {second.with_article} and {third.with_article} in a list.", f"1. {second.name}\n2. {third.name}"),
        (f"Is the word {fourth.name!r} longer than four letters?", "Yes." if len(fourth.name) > 4 else "No."),
    ]
    conversation: list[dict[str, Any]] = []
    for question, answer in shuffled(rng, rounds)[: int(rng.integers(1, 4))]:
        conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return conversation
