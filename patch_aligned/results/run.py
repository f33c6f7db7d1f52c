"""The run file of a benchmark: `result.json`, and `samples.jsonl` with one line per row.

A run is a folder. `result.json` is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from patch_aligned.files import describe_invalid, written_whole

# The two readings of a box in an answer, and the names of the scores of referring expressions.
#
# LLaVA-1.5 gives boxes in 0..1 of the image padded to a centred square; much of the literature in 0..1 of the image.

BoxFrame = Literal["square", "image"]

PADDED_FRAME = "acc@0.5 padded frame undone"
IMAGE_FRAME = "acc@0.5 read in image frame"
ACCURACY: dict[BoxFrame, str] = {"square": PADDED_FRAME, "image": IMAGE_FRAME}
LEGACY_METRIC = "refcoco_ACC@0.5"
"""Score of lmms-eval's own `*_bbox_rec_*` tasks, which are called legacy here."""

FORMAT = 1
RESULT_FILE = "result.json"
SAMPLES_FILE = "samples.jsonl"


class RunFileError(ValueError):
    """Raised for a run that is missing, incomplete or invalid. The message says where, and what to do."""


@dataclass(frozen=True)
class ModelIdentity:
    """The model that gave the answers."""

    name: str  # as shown in tables
    path: str  # as given to the run
    sha256: str  # `checkpoint_sha256` of its files
    base: str | None = None  # the language model under an adapter or a projector
    base_sha256: str | None = None  # None without a base, or if it is a name on the hub

    @property
    def weights(self) -> tuple[str, str | None, str | None]:
        """The hash, and the base by its hash or its name on the hub: independent of where the folders are."""
        return self.sha256, None if self.base_sha256 else self.base, self.base_sha256


@dataclass(frozen=True)
class Harness:
    """The program that asked the questions and scored the answers."""

    name: str
    version: str


@dataclass(frozen=True)
class RunSettings:
    """The settings that answers depend on."""

    prompt: str  # the first prompt, as the model received it
    conversation: str  # name of the template
    box_frame: BoxFrame | None  # how the headline reads boxes; None if answers are no boxes
    dtype: str  # of the weights
    batch_size: int
    seed: int
    temperature: FiniteFloat
    max_new_tokens: int
    num_processes: int
    limit: int | None  # with a limit on the rows, scores are only a trial
    judge: dict[str, Any] | None  # model and address


@dataclass(frozen=True)
class RunData:
    """The rows that were asked."""

    source: str  # data set or files
    revision: str | None  # commit of the data set, or `sha256:` and the hash of a local file
    split: str
    rows: int  # how many were answered: the lines of `samples.jsonl`
    rows_sha256: str  # see the function of that name


@dataclass(frozen=True)
class Score:
    """One number, in its unit: a `share` from 0 to 1, `points` out of 100, or a `sum`, such as MME's."""

    value: FiniteFloat
    stderr: Annotated[FiniteFloat, Field(ge=0)] | None
    rows: int  # that it is computed from
    unit: Literal["share", "points", "sum"]


@dataclass(frozen=True)
class Sample:
    """One row: question, answer and scores."""

    id: str  # unique within the benchmark
    prompt: str
    answer: str  # the model's text, unchanged
    target: Any  # the right answer, as the benchmark has it
    scores: dict[str, FiniteFloat] = field(default_factory=dict)  # of this row, by name, in the units of the run
    group: str | None = None  # such as its image: rows of one group are resampled together


@dataclass(frozen=True)
class RunResult:
    """The content of `result.json`."""

    benchmark: str  # such as `refcoco_val`
    tables: tuple[int, ...]  # numbers of the paper's tables that show it
    column: str  # its column there
    task: str  # of the harness
    model: ModelIdentity
    harness: Harness
    libraries: dict[str, str]  # versions by name
    settings: RunSettings
    data: RunData
    headline: str | None  # the score that tables show; None if a server scores the submission
    scores: dict[str, Score]
    submission: str | None = None  # file for a test server, relative to the run's folder
    not_available: dict[str, str] = field(default_factory=dict)  # reasons, by metric
    format: int = FORMAT


@dataclass(frozen=True)
class Run:
    """A result and its folder."""

    folder: Path
    result: RunResult


_RESULT = TypeAdapter(RunResult)
_SAMPLE = TypeAdapter(Sample)


def rows_sha256(rows: Iterable[tuple[str, Any]]) -> str:
    """Hash ids and targets (JSON values) in order. Runs with equal hashes were asked the same rows."""
    digest = hashlib.sha256()
    for row_id, target in rows:
        digest.update(json.dumps([row_id, target], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def write_run(folder: Path, result: RunResult, samples: Sequence[Sample]) -> None:
    """Write a run, each file atomically and `result.json` last. An existing run is replaced.

    Raises:
        RunFileError: result and samples do not match, or a value is invalid.
    """
    path = folder / RESULT_FILE
    try:
        document = {"format": result.format, **asdict(result)}
        content = (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
        lines = [f"{json.dumps(asdict(row), ensure_ascii=False, allow_nan=False)}\n".encode() for row in samples]
    except (TypeError, ValueError) as error:
        raise RunFileError(f"{folder}: found a value that JSON does not hold: {error}") from error
    _check_samples(_parse_samples(lines, folder / SAMPLES_FILE), _parse_result(content, path), folder / SAMPLES_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # no result until the new one is complete
    for target, text in ((folder / SAMPLES_FILE, b"".join(lines)), (path, content)):
        with written_whole(target) as temporary:
            temporary.write_bytes(text)


def read_run(folder: Path) -> RunResult:
    """Read `result.json` of a run's folder; `RunFileError` names file, field, what was found and was expected."""
    path = folder / RESULT_FILE
    if not path.is_file():
        raise RunFileError(f"{folder}: found no {RESULT_FILE}; expected the folder of a finished run")
    return _parse_result(path.read_bytes(), path)


def read_samples(folder: Path) -> list[Sample]:
    """Read `samples.jsonl` of a run's folder, and check that these are the rows of its result."""
    result = read_run(folder)
    path = folder / SAMPLES_FILE
    if not path.is_file():
        raise RunFileError(f"{path}: found no such file; expected the rows of {RESULT_FILE} beside it")
    with path.open("rb") as lines:
        samples = _parse_samples(lines, path)
    _check_samples(samples, result, path)
    return samples


def find_runs(folder: Path) -> list[Run]:
    """Find the runs of a folder, which is one or contains some (`OUT/<benchmark>/result.json`), by name."""
    paths = [folder / RESULT_FILE] if (folder / RESULT_FILE).is_file() else sorted(folder.glob(f"*/{RESULT_FILE}"))
    if not paths:
        raise RunFileError(
            f"{folder}: found no {RESULT_FILE}, neither there nor one folder below; expected a folder of runs. "
            "Make one with: python -m eval.run --help"
        )
    return [Run(path.parent, read_run(path.parent)) for path in paths]


def _parse_result(content: bytes, path: Path) -> RunResult:
    try:
        document = json.loads(content)
        if isinstance(document, dict) and (found := document.get("format")) != FORMAT:
            raise ValueError(f"field 'format': found {found!r}, expected {FORMAT}: run the benchmark again")
        result = _RESULT.validate_json(content, strict=True, extra="forbid")
        if result.headline is not None and result.headline not in {*result.scores, *result.not_available}:
            known = ", ".join(map(repr, result.scores)) or "none"
            raise ValueError(f"field 'headline': found {result.headline!r}, expected one of the scores: {known}")
        for name, score in result.scores.items():
            if score.unit == "share" and not 0 <= score.value <= 1 and "cider" not in name.lower():  # no share
                raise ValueError(f"field 'scores.{name}.value': found {score.value}, expected a share from 0 to 1")
        if both := sorted(result.scores.keys() & result.not_available.keys()):
            raise ValueError(f"field 'not_available': found {both[0]!r}, which has a score too")
    except ValueError as error:
        problem = describe_invalid(error) if isinstance(error, ValidationError) else error
        raise RunFileError(f"{path}: {problem}") from error
    return result


def _parse_samples(lines: Iterable[bytes], path: Path) -> list[Sample]:
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            samples.append(_SAMPLE.validate_json(line, strict=True, extra="forbid"))
        except ValidationError as error:
            raise RunFileError(f"{path}: line {number}: {describe_invalid(error)}") from error
    return samples


def _check_samples(samples: Sequence[Sample], result: RunResult, path: Path) -> None:
    if len(samples) != result.data.rows:
        raise RunFileError(
            f"{path}: found {len(samples)} rows, expected {result.data.rows} as 'data.rows' of {RESULT_FILE} says"
        )
    seen: set[str] = set()
    for number, sample in enumerate(samples, start=1):
        if sample.id in seen:
            raise RunFileError(f"{path}: line {number}, field 'id': found {sample.id!r} a second time")
        seen.add(sample.id)
    if (found := rows_sha256((sample.id, sample.target) for sample in samples)) != result.data.rows_sha256:
        raise RunFileError(
            f"{path}: found rows whose ids and targets hash to {found}, expected {result.data.rows_sha256} as "
            f"'data.rows_sha256' of {RESULT_FILE} says: the files belong to different runs"
        )
