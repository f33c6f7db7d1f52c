"""Captions, questions and expressions say what the scene holds, checked against the regions themselves."""

from __future__ import annotations

import re

import numpy as np
import pytest

from playground.mini.backgrounds import BACKGROUND_LABELS
from playground.mini.captions import FULL_STYLES, describe_at_length, write_caption
from playground.mini.questions import Question, ask_questions, box_text, converse, refer_to_objects
from playground.mini.scenes import Scene, compose_scene
from playground.mini.sprites import load_sprites
from playground.mini.wording import listed

SCENES = [(style, index) for style in ("simple", "full") for index in range(60)]
_NAMES = {word: sprite for sprite in load_sprites() for word in (sprite.name, sprite.plural)}
_MENTION = re.compile(r"\b(" + "|".join(sorted(_NAMES, key=len, reverse=True)) + r")\b")
_NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}


def _mentioned(text: str) -> set[str]:
    """Names of the sprites that a text mentions; "orange" as the colour of something is not the fruit."""
    names = set()
    for match in _MENTION.finditer(text.lower()):
        following = _MENTION.match(text.lower(), match.end() + 1)
        if not (match[0] == "orange" and following and _NAMES[following[0]].colour == "orange"):
            names.add(_NAMES[match[0]].name)
    return names


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Scene, np.random.Generator]]:
    return [compose_scene(11, "train", style, index) for style, index in SCENES]


@pytest.fixture(scope="module")
def questions(scenes: list[tuple[Scene, np.random.Generator]]) -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene, rng in scenes for question in ask_questions(scene, rng)]


@pytest.mark.parametrize("style", [write_caption, *FULL_STYLES])
def test_captions_mention_exactly_what_is_there(style, scenes: list[tuple[Scene, np.random.Generator]]) -> None:
    for scene, rng in scenes:
        present = {item.sprite.name for item in scene.objects}
        assert _mentioned(style(scene, rng)) == present


def test_captions_give_the_right_numbers(scenes: list[tuple[Scene, np.random.Generator]]) -> None:
    checked = 0
    for scene, rng in scenes:
        caption = describe_at_length(scene, rng).lower()
        for sprite in {item.sprite for item in scene.objects}:
            count = sum(item.sprite is sprite for item in scene.objects)
            word = sprite.name if count == 1 else sprite.plural
            numbers = re.findall(rf"\b({'|'.join(_NUMBERS)}) (?:{sprite.colour} )?{word}(?= on| in|\.)", caption)
            assert [_NUMBERS[number] for number in numbers] == [count], caption
            checked += count > 1
    assert checked > 5


def test_background_words_in_captions_are_visible_labels(scenes: list[tuple[Scene, np.random.Generator]]) -> None:
    for scene, rng in scenes:
        sentence = re.search(r"The background shows (.*)\.", describe_at_length(scene, rng))
        visible = {region.label for region in scene.background}
        named = {label for label in BACKGROUND_LABELS if sentence and re.search(rf"\b{label}\b", sentence[1])}
        assert named == visible


def test_counting_answers_equal_the_number_of_objects(questions: list[tuple[Scene, Question]]) -> None:
    for scene, question in questions:
        if question.category == "count":
            plural = re.fullmatch(r"How many (.*) are there\?", question.text)
            assert plural
            count = sum(item.sprite.plural == plural[1] for item in scene.objects)
            assert question.answer == str(count) and count > 0


def test_existence_has_one_yes_and_one_no_a_scene_and_both_are_true(questions: list[tuple[Scene, Question]]) -> None:
    answers = []
    for scene, question in questions:
        if question.category == "existence":
            (name,) = _mentioned(question.text)
            present = any(item.sprite.name == name for item in scene.objects)
            assert question.answer == ("Yes" if present else "No")
            answers.append(question.answer)
    assert answers.count("Yes") == answers.count("No") == len(SCENES)


def test_colours_places_and_relations_agree_with_the_scene(questions: list[tuple[Scene, Question]]) -> None:
    seen = set()
    for scene, question in questions:
        centre_x = {item.sprite.name: sum(item.box_xyxy_px[::2]) / 2 / scene.size_wh[0] for item in scene.objects}
        names = [_NAMES[match[0]].name for match in _MENTION.finditer(question.text)]
        if question.category == "colour":
            assert question.answer == _NAMES[names[0]].colour
        elif question.category == "position":
            third = next(
                word for word, end in (("left", 1 / 3), ("middle", 2 / 3), ("right", 1)) if centre_x[names[0]] < end
            )
            assert question.answer == third
        elif question.category == "relation":
            assert question.answer == ("Yes" if centre_x[names[0]] < centre_x[names[1]] else "No")
        elif question.category == "background":
            label = next(label for label in BACKGROUND_LABELS if re.search(rf"\b{label}\b", question.text))
            assert question.answer == ("Yes" if label in {region.label for region in scene.background} else "No")
        seen.add(question.category)
    assert seen == {"existence", "count", "colour", "position", "relation", "background", "name"}


def test_an_expression_fits_one_object_only(scenes: list[tuple[Scene, np.random.Generator]]) -> None:
    extreme = 0
    for scene, rng in scenes:
        for expression in refer_to_objects(scene, rng):
            item = scene.objects[expression.object_index]
            same = [other for other in scene.objects if other.sprite is item.sprite]
            if re.search("most|furthest", expression.text):
                pick = min if "left" in expression.text else max
                assert pick(same, key=lambda other: other.centre_xy_px[0]) is item
                extreme += 1
            elif "the only" in expression.text:
                assert sum(other.sprite.category == item.sprite.category for other in scene.objects) == 1
            else:
                assert same == [item]
    assert extreme > 5


def test_boxes_are_spoken_in_the_padded_square() -> None:
    # 200 x 100: padded by 50 above, then divided by 200.
    assert box_text((20, 10, 120, 60), (200, 100)) == "[0.10, 0.30, 0.60, 0.55]"
    assert box_text((10, 20, 60, 120), (100, 200)) == "[0.30, 0.10, 0.55, 0.60]"


def test_conversations_alternate_and_carry_one_image_token_in_the_first_turn(
    scenes: list[tuple[Scene, np.random.Generator]],
) -> None:
    for scene, rng in scenes:
        turns = converse(scene, rng)
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
        assert all(turn["value"].strip() for turn in turns)


def test_lists_read_as_english() -> None:
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
