"""METEOR, ROUGE-L, SPICE, CIDEr and BLEU of captions, as pycocoevalcap computes them, with the scores of each image."""

from __future__ import annotations

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
from typing import Any

import numpy as np

from patch_aligned.record_files import named

_VERSION = re.compile(r'version "(?:1\.)?(\d+)')  # 1.8.0_392 is Java 8


def java_version(program: str = "java") -> int:
    """Return the major version of a Java program. Raises `OSError` if it is missing or does not start."""
    advice = "next: apt-get install default-jre-headless, or conda install openjdk"
    if shutil.which(program) is None:
        raise OSError(f"{program}: found no such program, and caption metrics run in Java; {advice}")
    # On a Mac without Java there is a program of this name that only fails.
    told = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    version = _VERSION.search(told.stderr + told.stdout)
    if told.returncode != 0 or version is None:
        said = (told.stderr or told.stdout).strip().splitlines() or ["nothing"]
        raise OSError(f"{program} -version: found {said[0]!r}, expected a version; {advice}")
    return int(version.group(1))


def require_metrics() -> None:
    """Raise `ImportError` if pycocoevalcap is not installed, `OSError` if Java is missing."""
    if find_spec("pycocoevalcap") is None:
        raise ImportError("pycocoevalcap is not installed; next: pip install -e '.[eval]'")
    java_version()


# METEOR by pycocoevalcap, and its standard error.
#
# METEOR of many images is no mean over images: matches, lengths and chunks are summed, and the score is computed from
# the sums. So the standard error is a jackknife, which leaves out each image in turn. The formula of METEOR 1.5 is
# repeated here, because its program would have to run once per image.
#
# Letters: I images.

# Parameters of METEOR 1.5 for English, task `rank`: the paper's alpha, beta, gamma and delta, and the weights of
# matches of words, stems, synonyms and paraphrases.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
# Columns of a line of statistics. The 16 in the middle are matches of each kind: of content words in answer and
# reference, then of function words.
_ANSWER_WORDS, _REFERENCE_WORDS, _ANSWER_FUNCTION_WORDS, _REFERENCE_FUNCTION_WORDS = range(4)
_MATCHES = slice(4, 20)
_CHUNKS, _ANSWER_MATCHED, _REFERENCE_MATCHED = range(20, 23)


@dataclass(frozen=True)
class MetricScore:
    """A metric over all images: the mean over images, or for METEOR and BLEU computed from summed counts."""

    value: float
    stderr: float | None  # None with one image, and for BLEU
    of_image: dict[str, float]  # score of each image alone


def score_meteor(expected: Mapping[str, list[str]], found: Mapping[str, list[str]]) -> MetricScore:
    """Score one tokenized caption per image against its tokenized references."""
    lines: list[str] = []
    with _process(lines) as scorer:
        try:
            value, of_image = scorer.compute_score(expected, found)
        except (ValueError, OSError) as error:  # its output is no number, or it takes no more input: it has ended
            reached = [*expected, "none, at the sums"][sum(map(bool, lines))]
            raise OSError(
                f"METEOR: its Java process ended before its last score ({error}), at image {reached}; it asks for "
                "2 GB, which a caption of thousands of words can use up"
            ) from error
    statistics = np.array([[float(number) for number in line.split()] for line in lines])  # [I, 23]
    return MetricScore(value, jackknife_stderr(statistics), dict(zip(expected, of_image, strict=True)))


def jackknife_stderr(statistics: np.ndarray) -> float | None:
    """Standard error of METEOR over images, from METEOR's statistics `[I, 23]`; None with one image."""
    images = len(statistics)
    if images < 2:
        return None
    summands = statistics.copy()
    # METEOR counts no chunk if an answer equals a reference.
    summands[:, _CHUNKS] = np.where(_is_identical(statistics), 0, statistics[:, _CHUNKS])
    without = meteor_of(summands.sum(axis=0) - summands)  # [I]
    return float(np.sqrt((images - 1) / images * ((without - without.mean()) ** 2).sum()))


def meteor_of(statistics: np.ndarray) -> np.ndarray:
    """METEOR from its statistics `[*, 23]`; 0 if nothing matches."""
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
    """Make Java write numbers with a decimal point; the locale may use a comma."""
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
    """pycocoevalcap's scorer, which adds the statistics of images to `lines`. Its Java process ends with the block."""
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
            with suppress(OSError):  # input that it did not read
                pipe.close()
        if scorer.lock.locked():  # after an error: the scorer's destructor would wait for it
            scorer.lock.release()


# SPICE, if the user has CoreNLP 3.6.0, which it parses with: pycocoevalcap contains the rest of its code.
#
# Java is started here and not by pycocoevalcap, which downloads CoreNLP without asking and writes beside the installed
# package. Its cache of parsed references is not used: the library for it does not work on today's Java.

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
JARS_VARIABLE = "SPICE_JARS"
JAVA_VARIABLE = "SPICE_JAVA"
HEAP = "8G"
# SPICE writes its result with the JavaScript engine that Java had up to 14, and that nashorn-core provides.
LAST_JAVA_WITH_JAVASCRIPT = 14
JAVASCRIPT_JAR = "nashorn-core-*.jar"
_OPENED = ("java.lang", "java.util", "java.math", "java.net", "java.text", "java.io", "java.nio")
_FIRST_JAVA_WITH_MODULES = 9


@dataclass(frozen=True)
class SpiceSetup:
    """What SPICE is run with."""

    jars: Path  # folder of the user's jars, all of which are loaded
    java: str  # the program
    java_version: int  # its major version


def find_spice(jars: Path | None, java: str | None) -> SpiceSetup | str:
    """Find what SPICE needs, by option or environment; or say why SPICE is not available if no jars are named.

    Raises `OSError` if jars are named, but something is missing.
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
    """Return the F-score of each image's tuples, in the order of `expected`, or why there is none."""
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
    """The message of a Java exception, without its stack trace."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.strip().startswith("at ")]
    return next((line for line in lines if "Exception" in line or "Error" in line), lines[-1] if lines else "")


# Tokenization as the metrics need it: words of the Penn Treebank's tokenizer, lower case, without punctuation.
#
# pycocoevalcap's own wrapper does the same, but writes its input beside the installed package, which may be read-only,
# and assigns captions to wrong images if one contains a line break other than "\n".

# Line breaks of Java and of Python: a caption must be one line.
_LINE_BREAKS = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


def tokenize(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the captions of each image as words with single spaces. Raises `OSError` if the tokenizer fails."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = [_LINE_BREAKS.sub(" ", caption) for texts in captions.values() for caption in texts]
    if not lines:
        return {image: [] for image in captions}
    text = "".join(f"{line}\n" for line in lines)
    # Lone surrogates, which JSON can express, cannot be passed to a process.
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
class CaptionScores:
    """Scores of a set of captions."""

    metrics: dict[str, MetricScore]  # by name, in the order of `METRICS`
    not_available: dict[str, str]  # reasons for missing metrics
    images: int  # number of images
    empty: tuple[str, ...]  # images whose answer has no word; they count like all others


def score_captions(
    references: Mapping[str, Sequence[str]], answers: Mapping[str, str], spice: SpiceSetup | str
) -> CaptionScores:
    """Score one answer for each image against its reference captions; `spice` says how it is run, or why not.

    Raises `ValueError` for images without an answer or answers of other images, `OSError` if a metric's process fails.
    """
    _require_same_images(references, answers)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    images = list(references)
    expected = tokenize(references)
    found = tokenize({image: [answers[image]] for image in images})

    metrics = {METEOR: score_meteor(expected, found)}
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


def as_text(scores: CaptionScores) -> str:
    """The scores, a line each, and the number of images."""
    lines = []
    for name in METRICS:
        if name in scores.metrics:
            metric = scores.metrics[name]
            error = "" if metric.stderr is None else f" ± {metric.stderr:.4f}"
            lines.append(f"{name:<8} {metric.value:.4f}{error}")
        else:
            lines.append(f"{name:<8} not available: {scores.not_available[name]}")
    without = f", {len(scores.empty)} with an empty answer" if scores.empty else ""
    return "\n".join([*lines, f"{scores.images} images{without}"])


def as_json(scores: CaptionScores) -> dict[str, Any]:
    """All scores, of all images together and of each."""
    return {
        "images": scores.images,
        "empty": list(scores.empty),
        "scores": {name: {"value": m.value, "stderr": m.stderr} for name, m in scores.metrics.items()},
        "not_available": scores.not_available,
        "of_image": {
            image: {name: metric.of_image[image] for name, metric in scores.metrics.items()}
            for image in scores.metrics[METEOR].of_image
        },
    }
