"""METEOR, ROUGE-L, BLEU and CIDEr of captions: pycocoevalcap's numbers, and beside them what each image scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from eval.captions.java import JavaError
from eval.captions.references import named
from eval.captions.spice import SpiceSetup, score_spice
from eval.captions.words import tokenize

METEOR, ROUGE_L, SPICE, CIDER = "METEOR", "ROUGE_L", "SPICE", "CIDEr"
BLEU = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4")
METRICS = (METEOR, ROUGE_L, SPICE, CIDER, *BLEU)


@dataclass(frozen=True)
class MetricScore:
    """A metric over all images.

    Attributes:
        value: pycocoevalcap's. ROUGE-L, CIDEr and SPICE are means over images; METEOR and BLEU are taken from counts
            summed over all images, so they are near the mean, not equal to it.
        stderr: standard error of the mean of `of_image`; None with one image, and for BLEU, which is no mean at all.
        of_image: score of each image alone.
    """

    value: float
    stderr: float | None
    of_image: dict[str, float]


@dataclass(frozen=True)
class CaptionScores:
    """What a set of captions scores.

    Attributes:
        metrics: by name, in the order of `METRICS`.
        not_available: metrics that could not be taken, with the reason.
        images: how many there are.
        empty: images whose answer has no word. They count as any other.
    """

    metrics: dict[str, MetricScore]
    not_available: dict[str, str]
    images: int
    empty: tuple[str, ...]


def score_captions(
    references: Mapping[str, Sequence[str]], answers: Mapping[str, str], spice: SpiceSetup | str
) -> CaptionScores:
    """Scores one answer an image against the image's reference captions.

    Args:
        references: one or more captions of each image.
        answers: of exactly these images.
        spice: how to run SPICE, or why it is not run.

    Raises:
        ValueError: answers are missing or too many; they are named.
        JavaError: a metric's process failed.
    """
    _require_same_images(references, answers)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    images = list(references)
    expected = tokenize(references)
    found = tokenize({image: [answers[image]] for image in images})

    metrics = {METEOR: _score(images, *_meteor(expected, found))}
    metrics[ROUGE_L] = _score(images, *Rouge().compute_score(expected, found))
    not_available = {}
    if isinstance(spice, str):
        not_available[SPICE] = spice
    else:
        of_image = score_spice(expected, found, spice)
        if isinstance(of_image, str):
            not_available[SPICE] = of_image
        else:
            metrics[SPICE] = _score(images, statistics.fmean(of_image), of_image)
    metrics[CIDER] = _score(images, *Cider().compute_score(expected, found))
    for name, value, of_image in zip(BLEU, *Bleu(4).compute_score(expected, found, verbose=0), strict=True):
        metrics[name] = _score(images, value, of_image, is_mean=False)
    empty = tuple(image for image in images if not found[image][0])
    return CaptionScores(metrics, not_available, len(images), empty)


def _score(images: Sequence[str], value: float, of_image: Sequence[float], is_mean: bool = True) -> MetricScore:
    numbers = [float(score) for score in of_image]
    is_spread = is_mean and len(numbers) > 1
    stderr = statistics.stdev(numbers) / math.sqrt(len(numbers)) if is_spread else None
    return MetricScore(float(value), stderr, dict(zip(images, numbers, strict=True)))


def _require_same_images(references: Mapping[str, Any], answers: Mapping[str, Any]) -> None:
    if not references:
        raise ValueError("references: found no image, expected captions of at least one")
    missing = [image for image in references if image not in answers]
    if missing:
        raise ValueError(
            f"answers: found {len(references) - len(missing)} of {len(references)}, none for {named(missing)}; next: "
            "caption the rest, or score fewer images with --limit"
        )
    if unknown := [image for image in answers if image not in references]:
        raise ValueError(
            f"answers: found {len(unknown)} on images that the references do not have: {named(unknown)}; are these "
            "the captions of the same images?"
        )


def _meteor(expected: Mapping[str, list[str]], found: Mapping[str, list[str]]) -> tuple[float, list[float]]:
    with _meteor_process() as scorer:
        try:
            return scorer.compute_score(expected, found)
        except (ValueError, OSError) as error:  # its answer is no number, or it takes no more input: it has ended
            raise JavaError(
                f"METEOR: its Java process ended before its last score ({error}); it asks for 2 GB"
            ) from error


@contextmanager
def _meteor_process() -> Iterator[Any]:
    """pycocoevalcap's scorer, whose Java process ends with the block and not with the garbage collector."""
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    process = scorer.meteor_p
    try:
        yield scorer
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):  # what it did not take any more
                pipe.close()
        if scorer.lock.locked():  # as an error leaves it: the scorer would wait for it when it is thrown away
            scorer.lock.release()
