"""Scores are pycocoevalcap's own, each run gives the same, and no process stays behind."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.captions.metrics import BLEU, CIDER, METEOR, ROUGE_L, SPICE, CaptionScores, score_captions, tokenize

pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is part of the extra `eval`")

pytestmark = pytest.mark.slow  # METEOR takes a quarter of a minute to read its tables
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")

REFERENCES = {
    "a": ("A café with two dogs, outside.", "Two dogs sit in front of a coffee shop."),
    "b": ("A man rides a horse on the beach.",),
    "c": ('A "red" bus (number 7) waits at the stop!', "The bus isn't moving."),
    "d": ("Three cats are sleeping.", "cats"),
    "e": ("An empty street at night.", "A street."),
}
ANSWERS = {"a": "Two dogs sitting at a café", "b": "a man on a horse", "c": "A red bus ||| at a stop.", "d": " . ",
           "e": "an empty street at night"}  # fmt: skip


def as_records(captions: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """As pycocoevalcap's tokenizer takes them."""
    return {image: [{"caption": caption} for caption in texts] for image, texts in captions.items()}


@pytest.fixture(scope="module")
def meteors() -> list[Any]:
    """The METEOR scorers that were made, in order."""
    return []


@pytest.fixture(scope="module")
def ours(meteors: list[Any]) -> CaptionScores:
    from pycocoevalcap.meteor import meteor

    class Watched(meteor.Meteor):
        def __init__(self) -> None:
            super().__init__()
            meteors.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meteor, "Meteor", Watched)
        patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")  # writes numbers with a comma
        return score_captions(REFERENCES, ANSWERS, "no jars")


@pytest.fixture(scope="module")
def without_each() -> list[float]:
    """METEOR of all images but one, for each; filled by `theirs`, whose process is at hand."""
    return []


@pytest.fixture(scope="module")
def theirs(without_each: list[float]) -> dict[str, tuple[Any, Any]]:
    """Value and numbers of the images, from pycocoevalcap alone: its tokenizer, its scorers."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    expected = PTBTokenizer().tokenize(as_records(REFERENCES))
    found = PTBTokenizer().tokenize(as_records({image: [text] for image, text in ANSWERS.items()}))
    scores = {METEOR: Meteor(), ROUGE_L: Rouge(), CIDER: Cider()}
    results = {name: scorer.compute_score(expected, found) for name, scorer in scores.items()}
    for left_out in REFERENCES:
        rest = [{image: texts[image] for image in texts if image != left_out} for texts in (expected, found)]
        without_each.append(scores[METEOR].compute_score(*rest)[0])
    return results | dict(zip(BLEU, zip(*Bleu(4).compute_score(expected, found, verbose=0), strict=True), strict=True))


@needs_java
def test_scores_equal_those_of_pycocoevalcap_to_the_last_digit(
    ours: CaptionScores, theirs: dict[str, tuple[Any, Any]]
) -> None:
    assert list(ours.metrics) == [METEOR, ROUGE_L, CIDER, *BLEU]
    for name, (value, of_image) in theirs.items():
        assert ours.metrics[name].value == value, name
        assert list(ours.metrics[name].of_image.values()) == list(of_image), name
    assert 0.1 < ours.metrics[METEOR].value < 0.9


@needs_java
def test_the_standard_error_is_that_of_a_mean_of_images(ours: CaptionScores) -> None:
    rouge = ours.metrics[ROUGE_L]
    numbers = list(rouge.of_image.values())
    assert rouge.value == pytest.approx(statistics.fmean(numbers), rel=1e-12)
    assert rouge.stderr == pytest.approx(statistics.stdev(numbers) / math.sqrt(5), rel=1e-12)
    assert all(ours.metrics[name].stderr is None for name in BLEU)


@needs_java
def test_meteors_standard_error_is_the_jackknifes(
    ours: CaptionScores, theirs: dict[str, tuple[Any, Any]], without_each: list[float]
) -> None:
    """Against METEOR itself, run without each image; one answer is a reference word for word, one has no word."""
    assert 1 in theirs[METEOR][1] and 0 in theirs[METEOR][1]
    mean = statistics.fmean(without_each)
    variance = (5 - 1) / 5 * sum((value - mean) ** 2 for value in without_each)
    assert ours.metrics[METEOR].stderr == pytest.approx(math.sqrt(variance), rel=1e-9)


@needs_java
def test_an_answer_without_words_counts_and_is_counted(ours: CaptionScores) -> None:
    assert ours.empty == ("d",)
    assert ours.images == 5
    assert all(metric.of_image["d"] == 0 for metric in ours.metrics.values())


@needs_java
def test_a_metric_that_cannot_be_taken_has_a_reason_and_no_score(ours: CaptionScores) -> None:
    assert ours.not_available == {SPICE: "no jars"}
    assert SPICE not in ours.metrics


@needs_java
def test_no_java_process_stays_behind(ours: CaptionScores, meteors: list[Any]) -> None:
    assert len(meteors) == 1
    assert meteors[0].meteor_p.poll() is not None
    assert meteors[0].meteor_p.stdin.closed and meteors[0].meteor_p.stdout.closed


@needs_java
def test_words_are_those_of_pycocoevalcap() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {
        "marks": ["It's 3.5 o'clock -- \"really\"? (yes) [no] {maybe}; ok...", "don't can't U.S. etc."],
        "letters": ["Naïve 日本 façade — a dog & cat/horse", "A B\nC"],
        "nothing": ["", ".", "  "],
    }
    assert tokenize(captions) == PTBTokenizer().tokenize(as_records(captions))


@needs_java
@pytest.mark.parametrize("line_break", ["\r", "\r\n", "\u2028", "\x85", "\v", "\x1c"])
def test_a_line_break_within_a_caption_does_not_move_the_others(line_break: str) -> None:
    captions = {"a": [f"A red{line_break}bus"], "b": ["Two cats"]}
    assert tokenize(captions) == {"a": ["a red bus"], "b": ["two cats"]}


def test_images_without_an_answer_are_named() -> None:
    with pytest.raises(ValueError, match=r"found 1 of 5, none for a, b, d, e; next: caption the rest"):
        score_captions(REFERENCES, {"c": "a bus"}, "no jars")


def test_answers_on_other_images_are_named() -> None:
    with pytest.raises(ValueError, match=r"found 1 on images that the references do not have: z"):
        score_captions(REFERENCES, {**ANSWERS, "z": "a bus"}, "no jars")


TOKENIZER_ALONE = """
if "edu.stanford.nlp.process.PTBTokenizer" in sys.argv:
    sys.stdout.write(sys.stdin.read())
else:
    sys.exit(3)
"""


def test_a_meteor_that_ends_early_is_an_error_and_no_standstill(fake_java: Callable[..., Path]) -> None:
    fake_java(TOKENIZER_ALONE)
    with pytest.raises(OSError, match=r"METEOR: its Java process ended before its last score \(.+\), at image a;"):
        score_captions(REFERENCES, ANSWERS, "no jars")


@pytest.mark.parametrize(("answered", "reached"), [(2, "c"), (5, "none, at the sums")])
def test_the_image_that_meteor_ended_at_is_named(fake_java: Callable[..., Path], answered: int, reached: str) -> None:
    of_each = (
        f"else:\n    for _ in range({answered}):\n        sys.stdin.readline()\n        print('1 2', flush=True)\n"
    )
    fake_java(TOKENIZER_ALONE.split("else:")[0] + of_each)
    with pytest.raises(OSError, match=f"at image {reached}; it asks for 2 GB"):
        score_captions(REFERENCES, ANSWERS, "no jars")


def test_a_tokenizer_that_loses_captions_is_an_error(fake_java: Callable[..., Path]) -> None:
    fake_java("print('a dog')\nprint('no memory', file=sys.stderr)")
    with pytest.raises(OSError, match="tokenizer: found 1 lines, expected 9; Java said 'no memory'"):
        score_captions(REFERENCES, ANSWERS, "no jars")
