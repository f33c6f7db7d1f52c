"""Scores of answers to the miniature's short questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypedDict

EXACT_MATCH = "exact_match"
WITHIN_ONE = "within_one"
YES_SHARE = "yes_share"
F1 = "f1"

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_WORD = re.compile(r"[a-z0-9]+")
# "On the left", "a red" and "the middle" mean the same as "left", "red" and "middle".
_IGNORED = {"a", "an", "the", "on", "in", "at", "to", "there", "it", "is", "are"}


class YesNo(TypedDict):
    """Whether a row's answer, and the truth, is yes."""

    said: bool
    true: bool


def normalise(text: str) -> str:
    """Convert to lower case without punctuation, articles and the like, and numbers to digits.

    Other words stay, so that an answer with additional words is another answer.
    """
    words = _WORD.findall(text.lower())
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _IGNORED)


def score_short(answer: str, target: str) -> dict[str, float]:
    """1 if answer and target are equal after normalisation, else 0."""
    return {EXACT_MATCH: float(normalise(answer) == normalise(target))}


def score_count(answer: str, target: str) -> dict[str, float]:
    """As `score_short`, and 1 if the answer contains a single number that differs by at most one."""
    numbers = [int(word) for word in normalise(answer).split() if word.isdigit()]
    near = len(numbers) == 1 and abs(numbers[0] - int(target)) <= 1
    return {**score_short(answer, target), WITHIN_ONE: float(near)}


def score_existence(answer: str, target: str) -> dict[str, float | YesNo]:
    """Score the answer's first word: `exact_match`, a term of the share of yes, and a term of `f1_of_yes`."""
    said = normalise(answer).split(" ")[0]
    truth = normalise(target)
    return {
        EXACT_MATCH: float(said == truth),
        YES_SHARE: float(said == "yes"),
        F1: {"said": said == "yes", "true": truth == "yes"},
    }


def f1_of_yes(rows: Sequence[YesNo]) -> float:
    """Harmonic mean of precision and recall of the answer yes; 0 if it is never right."""
    hits = sum(row["said"] and row["true"] for row in rows)
    answered = sum(row["said"] for row in rows)
    true = sum(row["true"] for row in rows)
    return 2 * hits / (answered + true) if hits else 0.0
