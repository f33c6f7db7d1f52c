"""METEOR by pycocoevalcap, and its standard error.

METEOR of many images is no mean over images: matches, lengths and chunks are summed, and one score is taken from the
sums. So its standard error is the jackknife's, which takes the score anew without each image in turn: by the formula of
METEOR 1.5, written down here, since its program would have to be run as often as there are images.

Letters: I images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from eval.captions.java import JavaError

# Parameters of METEOR 1.5 for English, task `rank`: the paper's alpha, beta, gamma and delta, and the weights of
# matches of words, stems, synonyms and paraphrases.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
# Columns of a line of statistics. The 16 in between are matches: of each kind those of content words in answer and
# reference, then those of function words.
_ANSWER_WORDS, _REFERENCE_WORDS, _ANSWER_FUNCTION_WORDS, _REFERENCE_FUNCTION_WORDS = range(4)
_MATCHES = slice(4, 20)
_CHUNKS, _ANSWER_MATCHED, _REFERENCE_MATCHED = range(20, 23)


class MeteorScore(NamedTuple):
    """METEOR of all images together, its standard error (None with one image), and METEOR of each."""

    value: float
    stderr: float | None
    of_image: list[float]


def score_meteor(expected: Mapping[str, list[str]], found: Mapping[str, list[str]]) -> MeteorScore:
    """Scores one tokenized caption an image against its tokenized references.

    Raises:
        JavaError: the process ended early.
    """
    lines: list[str] = []
    with _process(lines) as scorer:
        try:
            value, of_image = scorer.compute_score(expected, found)
        except (ValueError, OSError) as error:  # its answer is no number, or it takes no more input: it has ended
            reached = [*expected, "none, at the sums"][sum(map(bool, lines))]
            raise JavaError(
                f"METEOR: its Java process ended before its last score ({error}), at image {reached}; it asks for "
                "2 GB, which a caption of thousands of words can use up"
            ) from error
    statistics = np.array([[float(number) for number in line.split()] for line in lines])  # [I, 23]
    return MeteorScore(value, jackknife_stderr(statistics), of_image)


def jackknife_stderr(statistics: np.ndarray) -> float | None:
    """Standard error of METEOR over images, from the scores without each of them.

    Args:
        statistics: `[I, 23]`, a line of METEOR's an image.
    """
    images = len(statistics)
    if images < 2:
        return None
    summands = statistics.copy()
    # METEOR counts no chunk where an answer is a reference word for word.
    summands[:, _CHUNKS] = np.where(_is_identical(statistics), 0, statistics[:, _CHUNKS])
    without = meteor_of(summands.sum(axis=0) - summands)  # [I]
    return float(np.sqrt((images - 1) / images * ((without - without.mean()) ** 2).sum()))


def meteor_of(statistics: np.ndarray) -> np.ndarray:
    """METEOR's score from its statistics `[*, 23]`; 0 where nothing matches."""
    words = statistics[..., [_ANSWER_WORDS, _REFERENCE_WORDS]]  # [*, 2], answer and reference
    function_words = statistics[..., [_ANSWER_FUNCTION_WORDS, _REFERENCE_FUNCTION_WORDS]]
    length = DELTA * (words - function_words) + (1 - DELTA) * function_words
    matches = statistics[..., _MATCHES].reshape(*statistics.shape[:-1], 4, 2, 2)  # kind, content or function, side
    weighted = np.einsum("...kcs,k,c->...s", matches, WEIGHTS, np.array([DELTA, 1 - DELTA]))  # [*, 2]
    matched = statistics[..., [_ANSWER_MATCHED, _REFERENCE_MATCHED]].mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(weighted / length, -1, 0)
        f_mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        fragmentation = np.where(_is_identical(statistics), 0, statistics[..., _CHUNKS] / matched)
        return np.nan_to_num(f_mean * (1 - GAMMA * fragmentation**BETA))


def _is_identical(statistics: np.ndarray) -> np.ndarray:
    words = statistics[..., [_ANSWER_WORDS, _REFERENCE_WORDS]]
    matched = statistics[..., [_ANSWER_MATCHED, _REFERENCE_MATCHED]]
    return (words == matched).all(axis=-1) & (statistics[..., _CHUNKS] == 1)


@contextmanager
def _process(lines: list[str]) -> Iterator[Any]:
    """pycocoevalcap's scorer, whose Java process ends with the block and not with the garbage collector.

    Args:
        lines: gets the statistics of each image.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    class Recording(Meteor):
        def _stat(self, hypothesis_str: str, reference_list: list[str]) -> str:
            lines.append(super()._stat(hypothesis_str, reference_list))
            return lines[-1]

    scorer = Recording()
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
