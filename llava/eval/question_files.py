"""Reads files of questions and answers, and says what is wrong with them before any model is loaded."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llava.eval.questions import Question

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_NAMES = {str: "a text", int: "a number", list: "a list", dict: "an object", type(None): "null"}


def name_of(value: Any) -> str:
    """What a JSON value is, in words."""
    return _NAMES.get(type(value), type(value).__name__)


def read_jsonl(path: str | Path, what: str) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; empty lines are passed over.

    Args:
        path: the file; `~` is the home folder.
        what: what the file holds, for the errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line holds no JSON object; the message names the line.
    """
    records = []
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error.msg}); expected one object a line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: found {_NAMES.get(type(record), 'a value')}, expected an object")
        records.append(record)
    return records


def read_json(path: str | Path, what: str, kind: type) -> Any:
    """The JSON value in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not of `kind`.
    """
    try:
        value = json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON ({error}); expected {what}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: found {_NAMES.get(type(value), 'a value')}, expected {_NAMES[kind]}: {what}")
    return value


def read_text(path: str | Path, what: str) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        FileNotFoundError: naming `what` was to be there.
        ValueError: it is no UTF-8.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    try:
        return place.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 ({error.reason} at byte {error.start}); expected {what}") from None


def field(record: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a record.

    Raises:
        ValueError: it is missing or of another kind.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(_NAMES.get(k, k.__name__) for k in kinds)
    if name not in record:
        raise ValueError(f"{where}: no field `{name}` (there are {', '.join(record) or 'none'}); expected {expected}")
    if not isinstance(record[name], kinds) or isinstance(record[name], bool):
        raise ValueError(f"{where}, field `{name}`: found {record[name]!r}, expected {expected}")
    return record[name]


def image_path(name: str, image_folder: str | Path, where: str) -> Path:
    """Where the image of a record lies.

    Raises:
        ValueError: its path leaves the image folder. Without a folder any path is taken as it is.
    """
    path = Path(name)
    if str(image_folder) and (path.anchor or ".." in path.parts):
        raise ValueError(
            f"{where}, field `image`: {name} leads out of --image-folder {image_folder}; write it relative"
        )
    return Path(image_folder).expanduser() / path


def vqa_questions(path: str | Path, image_folder: str | Path) -> list[Question]:
    """Questions of LLaVA's JSONL: `question_id`, `image` (null for a question about text alone) and `text`.

    An id may come several times: in MME and TextVQA it names the image.

    Raises:
        ValueError: a field is missing or of another kind.
    """
    questions = []
    for number, record in enumerate(read_jsonl(path, "questions, one JSON object a line (--question-file)"), start=1):
        where = f"{path}, record {number}"
        question_id = field(record, "question_id", (str, int), where)
        image = field(record, "image", (str, type(None)), where)
        text = field(record, "text", str, where)
        images = () if image is None else (image_path(image, image_folder, where),)
        questions.append(Question(question_id, text, images))
    return questions


def chunk_of(items: Sequence[Item], num_chunks: int, chunk_idx: int) -> list[Item]:
    """Chunk `chunk_idx` of `num_chunks`: all of one size, rounded up, and the last ones smaller or empty.

    Raises:
        ValueError: there is no such chunk.
    """
    if not 0 <= chunk_idx < num_chunks:
        raise ValueError(f"--chunk-idx {chunk_idx}: expected 0 to {num_chunks - 1}, as --num-chunks is {num_chunks}")
    size = math.ceil(len(items) / num_chunks)
    return list(items[chunk_idx * size : (chunk_idx + 1) * size])


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """Answers that the commands here have written: `question_id`, `prompt` and `text`. Warns of empty ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds none, or a field is missing or of another kind.
    """
    answers = read_jsonl(path, "answers, one JSON object a line (--result-file)")
    for number, answer in enumerate(answers, start=1):
        where = f"{path}, record {number}"
        field(answer, "question_id", (str, int), where)
        field(answer, "text", str, where)
    if not answers:
        raise ValueError(f"{path}: found no answers; answer the questions first, by llava.eval.model_vqa_loader")
    if empty := sum(not answer["text"].strip() for answer in answers):
        logger.warning("%s: %d of %d answers are empty; they are scored as they are", path, empty, len(answers))
    return answers


def require_all_answered(asked: Iterable[Any], answered: Iterable[Any], path: str | Path, questions: str) -> None:
    """Checks that each question has its answer, once.

    Args:
        asked: what names each question.
        answered: the same for each answer.
        path: of the answers, for the errors.
        questions: where the questions are from, for the errors.

    Raises:
        ValueError: answers are missing, too many, or to other questions.
    """
    wanted, found = Counter(iter(asked)), Counter(iter(answered))  # of a dict, its keys
    missing, surplus = wanted - found, found - wanted
    strange = [name for name in surplus if name not in wanted]
    if strange:
        raise ValueError(
            f"{path}: {len(strange)} answers are to questions that are not in {questions}, such as {strange[0]!r}; "
            "is it another split?"
        )
    if surplus:
        name = next(iter(surplus))
        raise ValueError(f"{path}: {len(surplus)} questions have more than one answer, such as {name!r}")
    if missing:
        raise ValueError(
            f"{path}: {missing.total()} of {wanted.total()} questions in {questions} have no answer, such as "
            f"{next(iter(missing))!r}; run the command that answers them again, it goes on where it stopped"
        )


def write_result(path: str | None, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON where a path is given."""
    if path:
        place = Path(path).expanduser()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
