"""Answers to the miniature's short questions: what counts as the same answer, and what does not."""

from __future__ import annotations

import pytest

from eval.mini.scoring import YesNo, f1_of_yes, normalise, score_count, score_existence, score_short


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        ("left", "left"), ("Left.", "left"), ("on the left", "left"), ("In the middle.", "middle"),
        ("It is red.", "red"), (" red\n", "red"), ("two", "2"), ("There are 3.", "3"), ("Ten", "10"),
    ],
)  # fmt: skip
def test_case_punctuation_articles_and_number_words_do_not_matter(answer: str, target: str) -> None:
    assert score_short(answer, target) == {"exact_match": 1.0}


@pytest.mark.parametrize(
    ("answer", "target"), [("left or right", "left"), ("dark red", "red"), ("", "red"), ("12", "2"), ("reddish", "red")]
)
def test_other_words_make_another_answer(answer: str, target: str) -> None:
    assert score_short(answer, target) == {"exact_match": 0.0}


def test_nothing_is_left_of_an_answer_without_words() -> None:
    assert normalise(" . !") == ""


@pytest.mark.parametrize(
    ("answer", "exact", "near"),
    [("3", 1, 1), ("three", 1, 1), ("2", 0, 1), ("four", 0, 1), ("5", 0, 0), ("1 or 2", 0, 0), ("many", 0, 0),
     ("three dogs", 0, 1)],
)  # fmt: skip
def test_counts_are_exact_or_off_by_one(answer: str, exact: float, near: float) -> None:
    assert score_count(answer, "3") == {"exact_match": exact, "within_one": near}


@pytest.mark.parametrize(
    ("answer", "said", "right_if_yes", "right_if_no"),
    [("Yes", True, 1, 0), ("Yes, there is a dog.", True, 1, 0), ("no.", False, 0, 1), ("A dog", False, 0, 0),
     ("Yesterday", False, 0, 0), ("", False, 0, 0)],
)  # fmt: skip
def test_existence_goes_by_the_first_word(answer: str, said: bool, right_if_yes: float, right_if_no: float) -> None:
    for target, right in (("Yes", right_if_yes), ("No", right_if_no)):
        assert score_existence(answer, target) == {
            "exact_match": right, "yes_share": float(said), "f1": {"said": said, "true": target == "Yes"},
        }  # fmt: skip


def test_f1_of_yes() -> None:
    def rows(*pairs: tuple[bool, bool]) -> list[YesNo]:
        return [{"said": said, "true": true} for said, true in pairs]

    # Three said, of which two are true, of three that are: precision and recall are 2/3.
    assert f1_of_yes(rows((True, True), (True, True), (True, False), (False, True), (False, False))) == 2 / 3
    assert f1_of_yes(rows((True, True), (True, False))) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert f1_of_yes(rows((False, True), (True, False))) == 0
    assert f1_of_yes(rows((False, False))) == 0
