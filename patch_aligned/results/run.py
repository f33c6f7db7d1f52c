"""What a run of a benchmark leaves behind: `result.json` and, a line a row, `samples.jsonl`.

A run is a folder. `result.json` is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from patch_aligned.files import written_whole

# JSON into dataclasses, strictly: each field is there, no other is, and each has the type that it is declared with.

T = TypeVar("T")
_types_of = functools.cache(get_type_hints)  # reading them anew is half the time of a file with many rows


def read_json(text: str) -> Any:
    """A JSON document; numbers that are not finite are none.

    Raises:
        ValueError: says where the text is no JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except RecursionError:
        raise ValueError("no JSON that can be read: arrays or objects within each other, too deep") from None


def from_json(cls: type[T], document: Any) -> T:
    """An instance of a dataclass from a JSON object; JSON arrays become tuples where these are declared.

    Raises:
        ValueError: names the field, what was found and what was expected.
    """
    return _read(cls, document, "")


def _read(kind: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, place)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [argument for argument in arguments if argument is not type(None)]
        assert len(rest) == 1, "fields here are of one type, or that or None"
        return _read(rest[0], value, place)
    if origin is Literal:
        _expect(isinstance(value, str) and value in arguments, place, value, " or ".join(map(repr, arguments)))
        return value
    if origin is dict:
        _expect(isinstance(value, dict), place, value, "an object")
        return {key: _read(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if origin is tuple:
        _expect(isinstance(value, list | tuple), place, value, "an array")
        return tuple(_read(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if kind is Any:
        return value
    if kind is float:
        _expect(_is_number(value) and math.isfinite(value), place, value, "a finite number")
        return value
    if kind is int:
        _expect(_is_number(value) and isinstance(value, int), place, value, "a whole number")
        return value
    assert kind is str, kind
    _expect(isinstance(value, str), place, value, "a text")
    return value


def _read_fields(kind: Any, value: Any, place: str) -> Any:
    _expect(isinstance(value, dict), place, value, "an object")
    hints = _types_of(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    prefix = f"{place}." if place else ""
    for name in names:
        if name not in value:
            raise ValueError(f"field {prefix + name!r}: found nothing, expected it among {', '.join(names)}")
    for name in value:
        if name not in names:
            raise ValueError(f"field {prefix + name!r}: found one too many, expected {', '.join(names)}")
    return kind(**{name: _read(hints[name], value[name], prefix + name) for name in names})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expect(holds: bool, place: str, value: Any, expected: str) -> None:
    if not holds:
        shown = json.dumps(value, ensure_ascii=False, default=repr)
        where = f"field {place!r}: " if place else ""
        raise ValueError(f"{where}found {shown if len(shown) <= 80 else shown[:80] + '…'}, expected {expected}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"found {name}, expected a finite number")


# The two readings of a spoken box, and what scores of referring expressions are called.
#
# LLaVA-1.5 speaks boxes in 0..1 of the image padded to a centred square; much else speaks them in 0..1 of the image.

BoxFrame = Literal["square", "image"]

PADDED_FRAME = "acc@0.5 padded frame undone"
IMAGE_FRAME = "acc@0.5 read in image frame"
ACCURACY: dict[BoxFrame, str] = {"square": PADDED_FRAME, "image": IMAGE_FRAME}
LEGACY_METRIC = "refcoco_ACC@0.5"
"""Of lmms-eval's own `*_bbox_rec_*` tasks, which are called legacy here."""


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
        sha256: of `patch_aligned.files`.
        base: the language model under an adapter or a projector, or None.
        base_sha256: of the base's files, or None: without a base, or where it is a name on the hub.
    """

    name: str
    path: str
    sha256: str
    base: str | None = None
    base_sha256: str | None = None

    @property
    def weights(self) -> tuple[str, str | None, str | None]:
        """Hash, and of the base its name on the hub or its hash: the same wherever the folders are."""
        return self.sha256, None if self.base_sha256 else self.base, self.base_sha256


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
        for name, score in result.scores.items():
            if score.unit == "share" and not 0 <= score.value <= 1 and "cider" not in name.lower():  # no share
                raise ValueError(f"field 'scores.{name}.value': found {score.value}, expected a share from 0 to 1")
            if score.stderr is not None and score.stderr < 0:
                raise ValueError(f"field 'scores.{name}.stderr': found {score.stderr}, expected 0 or more")
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


# Under which conditions numbers came about, in words: what all cells of a table share once, the rest by column.

_PROMPT_CHARACTERS = 90
_FRAMES = {
    "square": "boxes read in the padded square and taken back to the image",
    "image": "boxes read in the image's own frame",
}


class Filled(NamedTuple):
    """A filled cell: where it stands and what it is from; `box_frame` is the reading that it shows."""

    column: str
    model: str
    result: RunResult
    box_frame: str | None = None


def conditions_of(cell: Filled) -> dict[str, str]:
    """What decided a number, by kind."""
    result, settings, data = cell.result, cell.result.settings, cell.result.data
    kind, colon, revision = (data.revision or "").rpartition(":")  # a commit, or `sha256:` and a hash
    at = f"@{kind}{colon}{revision[:12]}" if revision else ""
    return {
        "task": f"{result.harness.name} {result.harness.version}, task {result.task}",
        "rows": f"{data.rows:,} rows of {data.source}{at}, split {data.split}",
        "limit": f"cut by --limit {settings.limit}" if settings.limit is not None else "",
        "prompt": f"prompt “{shortened_prompt(settings.prompt)}”",
        "template": f"template {settings.conversation}",
        "boxes": _FRAMES[cell.box_frame] if cell.box_frame else "",
        "decoding": ("greedy" if settings.temperature == 0 else f"sampled at temperature {settings.temperature:g}")
        + f", at most {settings.max_new_tokens} new tokens",
        "numbers": f"{settings.dtype}, batch size {settings.batch_size}",
        "judge": f"judge {_judge_text(settings.judge)}" if settings.judge else "no judge",
    }


def shortened_prompt(prompt: str) -> str:
    """The question of a prompt: what follows its first image, on one line, its middle left out where it is long."""
    text = " ".join(prompt.partition("<image>")[2].split()) or " ".join(prompt.split())
    if len(text) <= _PROMPT_CHARACTERS:
        return text
    half = _PROMPT_CHARACTERS // 2
    return f"{text[:half].rpartition(' ')[0] or text[:half]} … {text[-half:].partition(' ')[2] or text[-half:]}"


def condition_notes(cells: Sequence[Filled]) -> list[str]:
    """Notes that give the conditions of each cell: what all share first, then what differs by column, and by model."""
    found = [(cell, conditions_of(cell)) for cell in cells]
    if not found:
        return []
    kinds = list(found[0][1])
    shared = [kind for kind in kinds if len({conditions[kind] for _, conditions in found}) == 1]
    columns = list(dict.fromkeys(cell.column for cell in cells))
    notes = []
    if texts := [found[0][1][kind] for kind in shared if found[0][1][kind]]:
        notes.append(f"{columns[0] if len(columns) == 1 else 'All columns'}: {'; '.join(texts)}.")
    columns_of: dict[str, list[str]] = {}
    for column in columns:
        here = [(cell.model, conditions) for cell, conditions in found if cell.column == column]
        texts = [text for kind in kinds if kind not in shared and (text := _by_model(here, kind))]
        if len({cell.result.data.rows_sha256 for cell in cells if cell.column == column}) > 1:
            texts.append("the models were asked different rows: their numbers do not compare")
        if texts:
            columns_of.setdefault("; ".join(texts), []).append(column)
    return [*notes, *(f"{', '.join(names)}: {text}." for text, names in columns_of.items())]


def _by_model(here: Sequence[tuple[str, dict[str, str]]], kind: str) -> str:
    by_text: dict[str, list[str]] = {}
    for model, conditions in here:
        by_text.setdefault(conditions[kind], []).append(model)
    if len(by_text) == 1:
        return next(iter(by_text))
    return ", ".join(f"{text} ({', '.join(models)})" for text, models in by_text.items() if text)


def _judge_text(judge: dict[str, object]) -> str:
    return str(judge.get("model") or ", ".join(f"{key} {value}" for key, value in judge.items()))
