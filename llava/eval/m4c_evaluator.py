"""Accuracy of short answers as the VQA challenges count it; names are upstream's.

Source: the VQA evaluation's normalisation of answers, as M4C applies it to TextVQA. The numbers of a published table
depend on each of its rules, the odd ones included; those are marked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

HUMAN_ANSWERS = 10
"""How many people answered each question."""

_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
    who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've
""".split()  # noqa: SIM905


def _misspelt(word: str) -> list[str]:
    """A contraction with one of its apostrophes forgotten."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {wrong: word for word in _CONTRACTIONS for wrong in _misspelt(word)} | {"somebody'd": "somebodyd"}
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_REMOVED = 32
"""upstream parity: a flag (`re.UNICODE`) stands where a count belongs, so no more than its value are removed."""


class EvalAIAnswerProcessor:
    """Brings answers that mean the same to the same text."""

    def word_tokenize(self, word: str) -> str:
        """In lower case, without commas and question marks, the `'s` set apart."""
        return word.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()

    def process_punctuation(self, in_text: str) -> str:
        """Removes punctuation beside a space, and makes it a space elsewhere; removes full stops, not decimal points.

        upstream parity: in a text with a comma between digits all punctuation is removed.
        """
        text = in_text
        for mark in PUNCTUATION:
            beside_space = f"{mark} " in in_text or f" {mark}" in in_text
            text = text.replace(mark, "" if beside_space or _COMMA_IN_NUMBER.search(in_text) else " ")
        return _FULL_STOP.sub("", text, count=_FULL_STOPS_REMOVED)

    def process_digit_article(self, in_text: str) -> str:
        """Writes numbers as digits, leaves articles out and puts apostrophes back."""
        words = [NUMBERS.get(word, word) for word in in_text.lower().split()]
        return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)

    def __call__(self, item: str) -> str:
        """The normalised answer."""
        text = self.word_tokenize(item).replace("\n", " ").replace("\t", " ").strip()
        return self.process_digit_article(self.process_punctuation(text))


class TextVQAAccuracyEvaluator:
    """Soft accuracy: an answer counts in full if three of ten people gave it."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def answer_scores(self, raw_answers: Sequence[str]) -> dict[str, float]:
        """Accuracy of each normalised answer: the mean, over the people, of min(1, others who gave it / 3)."""
        if len(raw_answers) != HUMAN_ANSWERS:
            raise ValueError(f"found {len(raw_answers)} human answers, expected {HUMAN_ANSWERS}")
        counts = Counter(self.answer_processor(answer) for answer in raw_answers)
        return {
            answer: (
                count * min(1.0, (count - 1) / 3)  # seen by those who gave it
                + (HUMAN_ANSWERS - count) * min(1.0, count / 3)
            )
            / HUMAN_ANSWERS
            for answer, count in counts.items()
        }

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, Any]]) -> float:
        """Mean accuracy of predictions, each with `pred_answer` and `gt_answers`."""
        return sum(self.score(pred["pred_answer"], pred["gt_answers"]) for pred in pred_list) / len(pred_list)

    def score(self, prediction: str, human_answers: Sequence[str]) -> float:
        """Accuracy of one answer, 0 to 1."""
        return self.answer_scores(human_answers).get(self.answer_processor(prediction), 0.0)
