"""METEOR, ROUGE-L, BLEU and CIDEr of captions: pycocoevalcap's numbers, and beside them what each image scores."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.captions.references import named

# The Java that the caption metrics run in.

_VERSION = re.compile(r'version "(?:1\.)?(\d+)')  # 1.8.0_392 is Java 8


def java_version(program: str = "java") -> int:
    """Major version of a Java.

    Raises:
        OSError: it is not there, or does not start.
    """
    advice = "next: apt-get install default-jre-headless, or conda install openjdk"
    if shutil.which(program) is None:
        raise OSError(f"{program}: found no such program, and caption metrics run in Java; {advice}")
    # On a Mac without Java a program of that name does nothing but fail.
    told = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    version = _VERSION.search(told.stderr + told.stdout)
    if told.returncode != 0 or version is None:
        said = (told.stderr or told.stdout).strip().splitlines() or ["nothing"]
        raise OSError(f"{program} -version: found {said[0]!r}, expected a version; {advice}")
    return int(version.group(1))


def require_metrics() -> None:
    """Checks that captions can be scored on this machine.

    Raises:
        ImportError: pycocoevalcap is not installed.
        OSError: Java is missing.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ImportError("pycocoevalcap is not installed; next: pip install -e '.[eval]'")
    java_version()


# METEOR by pycocoevalcap, and its standard error.
#
# METEOR of many images is not a mean over images: matches, lengths and chunks are summed, and the score is computed
# from the sums. So its standard error is a jackknife, which recomputes the score without each image in turn. The
# formula of METEOR 1.5 is repeated here, because its program would have to run once for each image.
#
# Letters: I images.

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
        OSError: the process ended early.
    """
    lines: list[str] = []
    with _process(lines) as scorer:
        try:
            value, of_image = scorer.compute_score(expected, found)
        except (ValueError, OSError) as error:  # its answer is no number, or it takes no more input: it has ended
            reached = [*expected, "none, at the sums"][sum(map(bool, lines))]
            raise OSError(
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
def _java_that_writes_points() -> Iterator[None]:
    """Let Java write numbers with a decimal point; its options from elsewhere, or the machine, may ask for a comma."""
    name = "JAVA_TOOL_OPTIONS"
    before = os.environ.get(name)
    os.environ[name] = f"{before or ''} -Duser.language=en -Duser.country=US".strip()
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


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

    with _java_that_writes_points():
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


# SPICE, where the user has what it needs: pycocoevalcap ships its code, not the CoreNLP 3.6.0 that it parses with.
#
# Java is started from here and not by pycocoevalcap, which downloads CoreNLP without asking and writes beside the
# installed package. Its cache of parsed references is left out: the library that it is written with does not work on
# today's Java.

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
JARS_VARIABLE = "SPICE_JARS"
JAVA_VARIABLE = "SPICE_JAVA"
HEAP = "8G"
# SPICE writes its result by way of the JavaScript that Java had up to 14, and that nashorn-core brings back.
LAST_JAVA_WITH_JAVASCRIPT = 14
JAVASCRIPT_JAR = "nashorn-core-*.jar"
_OPENED = ("java.lang", "java.util", "java.math", "java.net", "java.text", "java.io", "java.nio")
_FIRST_JAVA_WITH_MODULES = 9


@dataclass(frozen=True)
class SpiceSetup:
    """What SPICE is run with.

    Attributes:
        jars: folder of the user's jars, all of which are seen.
        java: the program.
        java_version: its major version.
    """

    jars: Path
    java: str
    java_version: int


def find_spice(jars: Path | None, java: str | None) -> SpiceSetup | str:
    """What SPICE needs, by option or by environment (`SPICE_JARS`, `SPICE_JAVA`).

    Returns:
        The set-up, or why SPICE is not available where nobody asked for it.

    Raises:
        OSError: it was asked for, and cannot run; the message says what is missing.
    """
    given = jars or os.environ.get(JARS_VARIABLE)
    if not given:
        return f"needs {JARS[0]} and {JARS[1]}: give their folder by --spice-jars or {JARS_VARIABLE}"
    folder = Path(given)
    if missing := [name for name in JARS if not (folder / name).is_file()]:
        raise OSError(
            f"--spice-jars: found no {' and no '.join(missing)} in {folder}; they are in "
            "stanford-corenlp-full-2015-12-09.zip of CoreNLP 3.6.0"
        )
    program = java or os.environ.get(JAVA_VARIABLE) or "java"
    version = java_version(program)
    if version > LAST_JAVA_WITH_JAVASCRIPT and not any(folder.glob(JAVASCRIPT_JAR)):
        raise OSError(
            f"--spice-jars: found Java {version}, and SPICE writes its result by the JavaScript that Java has up to "
            f"{LAST_JAVA_WITH_JAVASCRIPT}; next: --spice-java PATH of a Java 8 or 11, or put {JAVASCRIPT_JAR} with its "
            f"asm jars into {folder}"
        )
    return SpiceSetup(folder, program, version)


def score_spice(
    expected: Mapping[str, list[str]], found: Mapping[str, list[str]], setup: SpiceSetup
) -> list[float] | str:
    """The F-score of each image's tuples, in the order of `expected`, or why there is none.

    Args:
        expected: reference captions of each image, tokenized.
        found: one caption of each, tokenized.
        setup: of `find_spice`.
    """
    rows = [
        {"image_id": number, "test": found[image][0], "refs": captions}
        for number, (image, captions) in enumerate(expected.items())
    ]
    with tempfile.TemporaryDirectory(prefix="spice-") as name:
        folder = Path(name)
        (folder / "in.json").write_text(json.dumps(rows), encoding="utf-8")
        done = subprocess.run(_command(setup, folder), cwd=folder, capture_output=True, text=True, check=False)
        try:
            result = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"its Java process ended with status {done.returncode} and no result: {_last_words(done.stderr)}"
    f_scores = {row["image_id"]: row["scores"]["All"]["f"] for row in result}
    numbers = [f_scores.get(number) for number in range(len(rows))]
    undefined = sum(number is None or not math.isfinite(number) for number in numbers)
    if undefined:
        return f"gave no number for {undefined} of {len(rows)} images"
    return [float(number) for number in numbers if number is not None]


def _command(setup: SpiceSetup, folder: Path) -> list[str]:
    spec = find_spec("pycocoevalcap.spice")
    assert spec is not None and spec.origin is not None
    jar = Path(spec.origin).with_name("spice-1.0.jar")
    opened = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _OPENED]
    return [
        setup.java,
        *(opened if setup.java_version >= _FIRST_JAVA_WITH_MODULES else ()),
        f"-Xmx{HEAP}",
        f"-Djava.io.tmpdir={folder}",
        "-cp",
        os.pathsep.join([str(jar), str(setup.jars.resolve() / "*")]),
        "edu.anu.spice.SpiceScorer",
        str(folder / "in.json"),
        *("-out", str(folder / "out.json"), "-subset", "-silent"),
    ]


def _last_words(stderr: str) -> str:
    """What an exception says: its own line rather than the places it came through."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.strip().startswith("at ")]
    return next((line for line in lines if "Exception" in line or "Error" in line), lines[-1] if lines else "")


# Captions as the metrics read them: words of the Penn Treebank's tokenizer, lower case, without punctuation.
#
# pycocoevalcap's own wrapper does the same, but writes its input beside the installed package, which may be read-only,
# and loses track of which caption is whose where one holds a line break other than "\n".

# What Java ends a line at, and what Python does: a caption is one line.
_LINE_BREAKS = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


def tokenize(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Captions of each image as words with single spaces in between; a caption without words becomes empty.

    Raises:
        OSError: the tokenizer failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = [_LINE_BREAKS.sub(" ", caption) for texts in captions.values() for caption in texts]
    if not lines:
        return {image: [] for image in captions}
    text = "".join(f"{line}\n" for line in lines)
    # Halves of characters, which JSON can spell, are no text that a process could be handed.
    done = subprocess.run(command, input=text.encode(errors="replace"), capture_output=True, check=False)
    tokenized = done.stdout.decode().split("\n")[:-1]
    if done.returncode != 0 or len(tokenized) != len(lines):
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise OSError(f"tokenizer: found {len(tokenized)} lines, expected {len(lines)}; Java said {said[-1]!r}")
    words = iter(" ".join(w for w in line.split(" ") if w not in ptbtokenizer.PUNCTUATIONS) for line in tokenized)
    return {image: [next(words) for _ in texts] for image, texts in captions.items()}


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
        OSError: a metric's process failed.
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
