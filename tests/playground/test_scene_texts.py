"""Captions, questions and expressions say what the scene holds, checked against the regions themselves."""

from __future__ import annotations

import re

import numpy as np
import pytest

from playground.mini.backgrounds import BACKGROUND_LABELS
from playground.mini.captions import FULL_STYLES, describe_at_length, write_caption
from playground.mini.choices import choice_questions
from playground.mini.questions import (
    Question,
    ask_questions,
    box_text,
    converse,
    converse_without_image,
    refer_to_objects,
)
from playground.mini.scenes import Scene, compose_scene
from playground.mini.sprites import HELD_OUT, load_sprites
from playground.mini.wording import listed

SCENES = [(style, index) for style in ("simple", "full") for index in range(60)]
_NAMES = {word: sprite for sprite in load_sprites() for word in (sprite.name, sprite.plural)}
_MENTION = re.compile(r"\b(" + "|".join(sorted(_NAMES, key=len, reverse=True)) + r")\b")
_LABEL = re.compile(r"\b(" + "|".join(sorted(BACKGROUND_LABELS, key=len, reverse=True)) + r")\b")
_NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}


def _mentioned(text: str) -> set[str]:
    """Names of the sprites that a text mentions."""
    return {_NAMES[match[0]].name for match in _MENTION.finditer(text.lower())}


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Scene, np.random.Generator]]:
    return [compose_scene(11, "train", style, index, held_out=HELD_OUT) for style, index in SCENES]


@pytest.fixture(scope="module")
def questions(scenes: list[tuple[Scene, np.random.Generator]]) -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene, rng in scenes for question in ask_questions(scene, rng)]


def test_captions_mention_the_largest_names_alone(scenes: list[tuple[Scene, np.random.Generator]]) -> None:
    """And where no name may be mentioned, the background."""
    neglected = 0
    for scene, rng in scenes:
        largest: dict[str, int] = {}
        for item in scene.objects:
            if item.sprite.name not in HELD_OUT:
                largest[item.sprite.name] = max(largest.get(item.sprite.name, 0), int(item.mask.sum()))
        expected = sorted(largest, key=lambda name: -largest[name])[: scene.mentions]
        caption = write_caption(scene, rng)
        assert _mentioned(caption) == set(expected)
        assert expected or {*_LABEL.findall(caption)} == {region.label for region in scene.background}
        neglected += len({item.sprite.name for item in scene.objects}) - len(expected)
    assert {scene.mentions for scene, _ in scenes} == {1, 2}
    assert neglected > len(SCENES) / 2


@pytest.mark.parametrize("style", FULL_STYLES)
def test_styles_mention_all_that_they_are_given(style, scenes: list[tuple[Scene, np.random.Generator]]) -> None:
    for scene, rng in scenes:
        if scene.told:
            assert _mentioned(style(scene, rng)) == {item.sprite.name for item in scene.told}


def test_held_out_names_stand_in_no_text(scenes: list[tuple[Scene, np.random.Generator]]) -> None:
    for scene, rng in scenes:
        turns = [turn for _ in range(3) for turn in converse(scene, rng) + converse_without_image(rng, HELD_OUT)]
        texts = [turn["value"] for turn in turns] + [expression.text for expression in refer_to_objects(scene, rng)]
        texts += [text for question in ask_questions(scene, rng) for text in (question.text, question.sentence)]
        for choice in choice_questions(scene, rng, "", with_held_out=False):
            texts += [choice.question, *choice.options]
        assert not set().union(*map(_mentioned, texts)) & HELD_OUT
    assert sum(item.sprite.name in HELD_OUT for scene, _ in scenes for item in scene.objects) > 10


def test_captions_give_the_right_numbers(scenes: list[tuple[Scene, np.random.Generator]]) -> None:
    checked = 0
    for scene, rng in scenes:
        caption = describe_at_length(scene, rng).lower()
        for sprite, colour in {(item.sprite, item.colour) for item in scene.told}:
            count = sum(item.sprite is sprite for item in scene.objects)
            word = sprite.name if count == 1 else sprite.plural
            phrase = f"{colour} {word}" if colour else word
            numbers = re.findall(rf"\b({'|'.join(_NUMBERS)}) {phrase}(?= on| in|\.)", caption)
            assert [_NUMBERS[number] for number in numbers] == [count], caption
            checked += count > 1
    assert checked > 5


def test_background_words_in_captions_are_visible_labels(scenes: list[tuple[Scene, np.random.Generator]]) -> None:
    for scene, rng in scenes:
        sentence = re.search(r"The background shows (.*)\.", describe_at_length(scene, rng))
        visible = {region.label for region in scene.background}
        assert {*_LABEL.findall(sentence[1] if sentence else "")} == visible


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
    assert answers.count("Yes") == answers.count("No") > 0.9 * len(SCENES)


def test_colours_places_and_relations_agree_with_the_scene(questions: list[tuple[Scene, Question]]) -> None:
    seen = set()
    for scene, question in questions:
        centre_x = {item.sprite.name: sum(item.box_xyxy_px[::2]) / 2 / scene.size_wh[0] for item in scene.objects}
        names = [_NAMES[match[0]].name for match in _MENTION.finditer(question.text)]
        if question.category == "colour":
            assert [question.answer] == [item.colour for item in scene.objects if item.sprite.name == names[0]]
        elif question.category == "position":
            third = next(
                word for word, end in (("left", 1 / 3), ("middle", 2 / 3), ("right", 1)) if centre_x[names[0]] < end
            )
            assert question.answer == third
        elif question.category == "relation":
            assert question.answer == ("Yes" if centre_x[names[0]] < centre_x[names[1]] else "No")
        elif question.category == "background":
            [label] = _LABEL.findall(question.text)
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
