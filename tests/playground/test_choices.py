"""Questions with given answers: true of the scene, and not to be answered without it."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from playground.mini.choices import CELLS, YES_NO, ChoiceQuestion, choice_questions
from playground.mini.scenes import Scene, compose_scene
from playground.mini.sprites import HELD_OUT, held_out_names, load_sprites
from playground.mini.wording import THIRDS

SPRITES = {sprite.name: sprite for sprite in load_sprites()}
TASKS = {"caption", "existence", "name_of_category", "name", "side", "cell"}

Asked = list[tuple[Scene, ChoiceQuestion]]


@pytest.fixture(scope="module")
def asked() -> Asked:
    found = []
    for index in range(600):
        scene, rng = compose_scene(4, "heldout", "simple", index, held_out=held_out_names(1))
        found += [(scene, question) for question in choice_questions(scene, rng, "A dog.", with_held_out=True)]
    return found


def test_answers_are_true_and_options_are_of_one_block(asked: Asked) -> None:
    blocks = {"fixed": HELD_OUT, "seed": held_out_names(1) - HELD_OUT, None: frozenset(SPRITES) - held_out_names(1)}
    for scene, question in asked:
        answer = question.options[question.answer]
        at = {item.sprite.name: item.centre_xy_px for item in scene.objects}
        if question.task == "caption":
            assert question.options == ("A dog.",)
            continue
        assert question.name in blocks[question.held_out]
        assert question.name in question.question or question.task.startswith("name")
        if question.task == "existence":
            assert question.options == YES_NO and answer == ("Yes" if question.name in at else "No")
        elif question.task in ("name", "name_of_category"):
            assert [option in at for option in question.options] == [option == answer for option in question.options]
            assert answer == question.name and len(set(question.options)) == 4
            assert set(question.options) <= blocks[question.held_out]
            if question.task == "name_of_category":
                assert len({SPRITES[option].category for option in question.options}) == 1
        else:
            column, row = (int(3 * where / 224) for where in at[question.name])
            right = {"side": THIRDS[column], "cell": CELLS[3 * row + column]}
            assert answer == right[question.task]
            assert [item.sprite.name for item in scene.objects].count(question.name) == 1


def test_all_tasks_are_asked_about_names_of_all_blocks(asked: Asked) -> None:
    tasks = defaultdict(set)
    for _, question in asked:
        tasks[question.held_out].add(question.task)
    assert tasks == {None: TASKS, "fixed": TASKS - {"caption"}, "seed": TASKS - {"caption"}}


def test_a_reader_without_the_picture_is_near_chance(asked: Asked) -> None:
    """It answers what was right most often: for names the name that was the answer most often when it was an option."""
    half = len(asked) // 2
    frequency: Counter[tuple[str, str]] = Counter()
    offered: Counter[tuple[str, str]] = Counter()

    def keys(question: ChoiceQuestion) -> list[tuple[str, str]]:
        if question.task == "existence":
            return [(f"{question.task} {question.name}", option) for option in question.options]
        return [(question.task, option) for option in question.options]

    for _, question in asked[:half]:
        frequency[keys(question)[question.answer]] += 1
        offered.update(keys(question))
    right: dict[str, list[bool]] = defaultdict(list)
    for _, question in asked[half:]:
        rates = [(frequency[key] + 0.25) / (offered[key] + 1) for key in keys(question)]
        right[question.task].append(rates.index(max(rates)) == question.answer)
    chance = {"existence": 1 / 2, "name_of_category": 1 / 4, "name": 1 / 4, "side": 1 / 3, "cell": 1 / 9}
    for task, share in chance.items():
        error = (share * (1 - share) / len(right[task])) ** 0.5
        assert abs(sum(right[task]) / len(right[task]) - share) < max(3.5 * error, 0.04), task


def test_training_questions_are_conversations_of_one_round(asked: Asked) -> None:
    for _, question in asked[:50]:
        human, gpt = question.as_conversation()
        assert human == {"from": "human", "value": f"<image>\n{question.question}"}
        assert gpt == {"from": "gpt", "value": question.options[question.answer]}
