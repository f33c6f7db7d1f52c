"""Questions with a few given answers, scored by their likelihood: what is in the picture, and where.

Without the picture all answers are equally likely: absent names are drawn as present ones are, among names that texts
mention or among names that are held out, whichever the present one is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from playground.mini.captions import CAPTION_PROMPTS
from playground.mini.scenes import Scene, SceneObject
from playground.mini.sprites import HELD_OUT, Sprite, load_sprites
from playground.mini.wording import (
    THIRDS,
    cell_of_nine,
    choose,
    groups_by_name,
    is_clearly_in_its_third,
    listed,
    shuffled,
)

CELLS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
YES_NO = ("Yes", "No")
_DISTRACTORS = 3


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question and its possible answers.

    `held_out` says whether names are those that texts mention (None), those never mentioned (`fixed`), or those that
    the data set's seed held out (`seed`).
    """

    task: str  # `existence`, `name_of_category` (all options of one category), `name`, `side`, `cell` or `caption`
    question: str  # text without the image token
    options: tuple[str, ...]  # texts of the answers; a caption is the only one
    answer: int  # position of the right one
    name: str | None = None  # of the object asked about, also where it is absent; None for a caption
    held_out: str | None = None

    def as_conversation(self) -> list[dict[str, str]]:
        """One round in LLaVA's format."""
        return [
            {"from": "human", "value": f"<image>\n{self.question}"},
            {"from": "gpt", "value": self.options[self.answer]},
        ]


def choice_questions(
    scene: Scene, rng: np.random.Generator, caption: str, *, with_held_out: bool
) -> list[ChoiceQuestion]:
    """One question of each task that the scene allows (existence: a yes and a no), and the same of held-out names."""
    questions = [ChoiceQuestion("caption", choose(rng, CAPTION_PROMPTS), (caption,), 0)]
    for held_out in (None, "fixed", "seed") if with_held_out else (None,):
        sprites = [sprite for sprite in load_sprites(simple_only=scene.style == "simple")
                   if _held_out(sprite.name, scene) == held_out]  # fmt: skip
        groups = groups_by_name([item for item in scene.objects if _held_out(item.sprite.name, scene) == held_out])
        if groups:
            asked = _ask_names(groups, sprites, rng) + _ask_places(scene, groups, rng)
            questions += [replace(question, held_out=held_out) for question in asked]
    return questions


def _held_out(name: str, scene: Scene) -> str | None:
    return None if name not in scene.held_out else "fixed" if name in HELD_OUT else "seed"


def _ask_names(
    groups: dict[str, list[SceneObject]], sprites: list[Sprite], rng: np.random.Generator
) -> list[ChoiceQuestion]:
    """Questions which of `sprites` are there: those of `groups`, objects by name."""
    present = [group[0].sprite for group in groups.values()]
    absent = [sprite for sprite in sprites if sprite.name not in groups]
    questions = []
    for answer, options in enumerate((present, absent)):
        sprite = choose(rng, options)
        text = f"Is there {sprite.with_article} in the picture?"
        questions.append(ChoiceQuestion("existence", text, YES_NO, answer, sprite.name))
    for task in ("name_of_category", "name"):
        sprite = choose(rng, present)
        others = [other for other in absent if task == "name" or other.category == sprite.category]
        if len(others) >= _DISTRACTORS:
            four = shuffled(rng, [sprite, *shuffled(rng, others)[:_DISTRACTORS]])
            text = f"Which of these is in the picture: {listed([option.with_article for option in four], 'or')}?"
            names = tuple(option.name for option in four)
            questions.append(ChoiceQuestion(task, text, names, four.index(sprite), sprite.name))
    return questions


def _ask_places(scene: Scene, groups: dict[str, list[SceneObject]], rng: np.random.Generator) -> list[ChoiceQuestion]:
    """Questions where an object is that has its name alone and is not near a line between the thirds."""
    single = [group[0] for group in groups.values() if len(group) == 1]
    in_thirds = [item for item in single if is_clearly_in_its_third(scene, item)]
    in_cells = [item for item in in_thirds if is_clearly_in_its_third(scene, item, axis=1)]
    questions = []
    if in_thirds:
        item = choose(rng, in_thirds)
        text = f"Is the {item.sprite.name} on the left, in the middle or on the right?"
        questions.append(ChoiceQuestion("side", text, THIRDS, cell_of_nine(scene, item)[0], item.sprite.name))
    if in_cells:
        item = choose(rng, in_cells)
        column, row = cell_of_nine(scene, item)
        text = f"In which part of the picture is the {item.sprite.name}?"
        questions.append(ChoiceQuestion("cell", text, CELLS, 3 * row + column, item.sprite.name))
    return questions
