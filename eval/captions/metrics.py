"""METEOR, ROUGE-L, BLEU and CIDEr of captions: pycocoevalcap's numbers, and beside them what each image scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.captions.meteor import score_meteor
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
            summed over all images.
        stderr: standard error of that; None with one image, and for BLEU.
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

    meteor = score_meteor(expected, found)
    metrics = {METEOR: MetricScore(meteor.value, meteor.stderr, dict(zip(images, meteor.of_image, strict=True)))}
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


def mean_and_stderr(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent numbers and its standard error, None for a single one."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return statistics.fmean(numbers), None if spread is None else spread / math.sqrt(len(numbers))


def _score(images: Sequence[str], value: float, of_image: Sequence[float], is_mean: bool = True) -> MetricScore:
    numbers = [float(score) for score in of_image]
    stderr = mean_and_stderr(numbers)[1] if is_mean else None
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
