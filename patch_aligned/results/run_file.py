"""What a run of a benchmark leaves behind: `result.json` and, a line a row, `samples.jsonl`.

A run is a folder. `result.json` is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from patch_aligned.results.box_frames import BoxFrame
from patch_aligned.results.strict_json import from_json, read_json
from patch_aligned.whole_files import written_whole

FORMAT = 1
RESULT_FILE = "result.json"
SAMPLES_FILE = "samples.jsonl"


class RunFileError(ValueError):
    """A run that is missing, incomplete or not as this format has it; the message says where and what to do."""


@dataclass(frozen=True)
class ModelIdentity:
    """Whose answers they are.

    Attributes:
        name: as tables show it.
        path: as it was given to the run.
        sha256: of `patch_aligned.checkpoint_hash`.
        base: the language model under an adapter or a projector, or None.
        base_sha256: of the base's files, or None: without a base, or where it is a name on the hub.
    """

    name: str
    path: str
    sha256: str
    base: str | None = None
    base_sha256: str | None = None


@dataclass(frozen=True)
class Harness:
    """What asked the questions and scored the answers."""

    name: str
    version: str


@dataclass(frozen=True)
class RunSettings:
    """What decides the answers.

    Attributes:
        prompt: the first prompt, as the model got it.
        conversation: name of the template.
        box_frame: how the headline reads boxes: in the padded `square`, or in the `image`; None where there are none.
        dtype: of the weights.
        batch_size, seed, temperature, max_new_tokens, num_processes: of the generation.
        limit: rows that were asked for, or None for all: with a limit the scores are no result, only a trial.
        judge: model and address of the judge, or None.
    """

    prompt: str
    conversation: str
    box_frame: BoxFrame | None
    dtype: str
    batch_size: int
    seed: int
    temperature: float
    max_new_tokens: int
    num_processes: int
    limit: int | None
    judge: dict[str, Any] | None


@dataclass(frozen=True)
class RunData:
    """What was asked.

    Attributes:
        source: data set or files.
        revision: commit of the data set, or `sha256:` and the hash of a local file, or None.
        split: its name.
        rows: how many were answered, the lines of `samples.jsonl`.
        rows_sha256: `rows_sha256` of these.
    """

    source: str
    revision: str | None
    split: str
    rows: int
    rows_sha256: str


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        value: in its unit.
        stderr: standard error in the same unit, or None.
        rows: how many it is taken from.
        unit: `share` from 0 to 1, `points` out of 100, or a `sum`, such as MME's.
    """

    value: float
    stderr: float | None
    rows: int
    unit: Literal["share", "points", "sum"]


@dataclass(frozen=True)
class Sample:
    """One row: question, answer and scores.

    Attributes:
        id: names the row within the benchmark.
        prompt: the question.
        answer: the model's text, as it came.
        target: the right answer, as the benchmark has it.
        scores: numbers of this row, by the names of the run's scores, and in their units.
        group: such as its image: rows of a group are resampled together. None where rows stand alone.
    """

    id: str
    prompt: str
    answer: str
    target: Any
    scores: dict[str, float] = field(default_factory=dict)
    group: str | None = None


@dataclass(frozen=True)
class RunResult:
    """`result.json`.

    Attributes:
        benchmark: its name, such as `refcoco_val`.
        tables: numbers of the paper's tables it belongs to.
        column: its column there.
        task: the harness's task.
        model, harness, libraries, settings, data: where the numbers come from; `libraries` are versions by name.
        headline: the score that the table shows, or None where a server scores the submission.
        scores: by metric.
        submission: file for a test server, relative to the run's folder, or None.
        not_available: metrics that could not be taken, with the reason.
        format: of this file.
    """

    benchmark: str
    tables: tuple[int, ...]
    column: str
    task: str
    model: ModelIdentity
    harness: Harness
    libraries: dict[str, str]
    settings: RunSettings
    data: RunData
    headline: str | None
    scores: dict[str, Score]
    submission: str | None = None
    not_available: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Run:
    """A result and the folder it lies in."""

    folder: Path
    result: RunResult


def rows_sha256(rows: Iterable[tuple[str, Any]]) -> str:
    """Hash of ids and targets in order: runs that share it were asked the same.

    Args:
        rows: id and target of each, the target as JSON can hold it.
    """
    digest = hashlib.sha256()
    for row_id, target in rows:
        digest.update(json.dumps([row_id, target], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def write_run(folder: Path, result: RunResult, samples: Sequence[Sample]) -> None:
    """Writes a run, each file whole or not at all, `result.json` last; a run that was there is replaced.

    Raises:
        RunFileError: result and samples do not fit together, or hold what the format does not.
    """
    place = folder / RESULT_FILE
    try:
        document = {"format": result.format, **asdict(result)}
        result_text = (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
        lines = [f"{json.dumps(asdict(row), ensure_ascii=False, allow_nan=False)}\n".encode() for row in samples]
    except (TypeError, ValueError) as error:
        raise RunFileError(f"{folder}: a value that JSON does not hold: {error}") from error
    written = _result_of(result_text, place)  # what is written can be read
    _check_samples(_samples_of(lines, folder / SAMPLES_FILE), written, folder / SAMPLES_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)  # until the new one is complete, there is none
    for path, content in ((folder / SAMPLES_FILE, b"".join(lines)), (place, result_text)):
        with written_whole(path) as temporary:
            temporary.write_bytes(content)


def read_run(folder: Path) -> RunResult:
    """Reads `result.json` of a run's folder.

    Raises:
        RunFileError: names file, field, what was found and what was expected.
    """
    place = folder / RESULT_FILE
    if not place.is_file():
        raise RunFileError(f"{folder}: found no {RESULT_FILE}; expected the folder of a finished run")
    return _result_of(place.read_bytes(), place)


def read_samples(folder: Path) -> list[Sample]:
    """Reads `samples.jsonl` of a run's folder, and checks that these are the rows of its result.

    Raises:
        RunFileError: names file, line, field, what was found and what was expected.
    """
    result = read_run(folder)
    place = folder / SAMPLES_FILE
    if not place.is_file():
        raise RunFileError(f"{place}: found no such file; expected the rows of {RESULT_FILE} beside it")
    with place.open("rb") as lines:
        samples = _samples_of(lines, place)
    _check_samples(samples, result, place)
    return samples


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs in some folders, each of which is a run itself or has runs in it (`OUT/<benchmark>/result.json`).

    In the order of the folders; within one, by name.

    Raises:
        RunFileError: a folder has no finished run, or one that cannot be read.
    """
    runs = []
    for folder in folders:
        places = [folder / RESULT_FILE] if (folder / RESULT_FILE).is_file() else sorted(folder.glob(f"*/{RESULT_FILE}"))
        if not places:
            raise RunFileError(
                f"{folder}: found no {RESULT_FILE}, neither there nor one folder below; expected a folder of runs. "
                "Make one with: python -m eval.run --help"
            )
        runs += [Run(place.parent, read_run(place.parent)) for place in places]
    return runs


def _result_of(content: bytes, place: Path) -> RunResult:
    try:
        document = read_json(content.decode())
        if isinstance(document, dict) and (found := document.get("format")) != FORMAT:
            raise ValueError(f"field 'format': found {found!r}, expected {FORMAT}: run the benchmark again")
        result = from_json(RunResult, document)
        if result.headline is not None and result.headline not in {*result.scores, *result.not_available}:
            known = ", ".join(map(repr, result.scores)) or "none"
            raise ValueError(f"field 'headline': found {result.headline!r}, expected one of the scores: {known}")
        if both := sorted(result.scores.keys() & result.not_available.keys()):
            raise ValueError(f"field 'not_available': found {both[0]!r}, which has a score too")
    except ValueError as error:
        raise RunFileError(f"{place}: {error}") from error
    return result


def _samples_of(lines: Iterable[bytes], place: Path) -> list[Sample]:
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            samples.append(from_json(Sample, read_json(line.decode())))
        except ValueError as error:
            raise RunFileError(f"{place}: line {number}: {error}") from error
    return samples


def _check_samples(samples: Sequence[Sample], result: RunResult, place: Path) -> None:
    if len(samples) != result.data.rows:
        raise RunFileError(
            f"{place}: found {len(samples)} rows, expected {result.data.rows} as 'data.rows' of {RESULT_FILE} says"
        )
    seen: set[str] = set()
    for number, sample in enumerate(samples, start=1):
        if sample.id in seen:
            raise RunFileError(f"{place}: line {number}, field 'id': found {sample.id!r} a second time")
        seen.add(sample.id)
    if (found := rows_sha256((sample.id, sample.target) for sample in samples)) != result.data.rows_sha256:
        raise RunFileError(
            f"{place}: found rows whose ids and targets hash to {found}, expected {result.data.rows_sha256} as "
            f"'data.rows_sha256' of {RESULT_FILE} says: the files are of different runs"
        )
