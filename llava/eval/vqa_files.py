"""Reads files of questions and answers, and says what is wrong with them before any model is loaded."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from PIL import Image

from llava.command import write_json
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle
from llava.mm_utils import UnreadableImageError, load_rgb_image, require_image_tokens, upright_rgb
from llava.utils import sha256

# Questions about images, their answers, and the prompts that a template makes of them.

ImageSource = str | Path | bytes | Image.Image
"""A path, the bytes of an image file, or a picture."""

_READING = Lock()
"""Held while a picture reads its file, which it opens lazily and without a thought of threads."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        question_id: what the answer is joined to.
        text: may place its images by `<image>`; otherwise they come first, each on a line of its own.
        images: none for a question about nothing but its text.
        metadata: whatever the caller wants to find again at the answer.

    Raises:
        ValueError: the text has some `<image>`, but not one for each image.
    """

    question_id: str | int
    text: str
    images: tuple[ImageSource, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if DEFAULT_IMAGE_TOKEN in self.text:
            require_image_tokens(self.text, len(self.images), f"question {self.question_id!r}")


@dataclass(frozen=True)
class Answer:
    """What was answered.

    Attributes:
        question: as it was asked.
        prompt: the whole text that the model was given, template and `<image>` included.
        text: the answer without special tokens, the template's closing mark and outer white space.
    """

    question: Question
    prompt: str
    text: str


def prompt_of(question: Question, conversation: Conversation, mm_use_im_start_end: bool = False) -> str:
    """The question in the template, with an open turn for the answer.

    Under a plain template the prompt is the images and then the text, without a break: what stage 1 trains, where a
    caption follows its image. A caption is asked for by an empty text.
    """
    text = question.text
    mark = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{DEFAULT_IM_END_TOKEN}"
    mark = mark if mm_use_im_start_end else DEFAULT_IMAGE_TOKEN
    is_plain = conversation.sep_style is SeparatorStyle.PLAIN
    if DEFAULT_IMAGE_TOKEN in text:
        text = text.replace(DEFAULT_IMAGE_TOKEN, mark)
    elif is_plain:
        text = mark * len(question.images) + text
    else:
        text = f"{mark}\n" * len(question.images) + text
    if is_plain:
        return conversation.system + text
    dialogue = conversation.copy()
    dialogue.append_message(dialogue.roles[0], text)
    dialogue.append_message(dialogue.roles[1], None)
    return dialogue.get_prompt()


def require_images(questions: Sequence[Question]) -> None:
    """Checks that all image files are there."""
    asked_by: dict[str, Question] = {}
    for question in questions:
        for image in question.images:
            if isinstance(image, str | Path):
                asked_by.setdefault(os.fspath(image), question)
    missing = [path for path in asked_by if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"question {asked_by[missing[0]].question_id!r}: no such image file {missing[0]} "
            f"({len(missing)} of {len(asked_by)} images are missing); check the image folder"
        )


def open_image(source: ImageSource, where: str = "an image") -> Image.Image:
    """The picture, as RGB.

    Args:
        source: where it comes from. A picture that is not read yet is read once, even by threads that share it.
        where: names it in errors, where it has no path.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(source, str | Path):
        return load_rgb_image(source)
    try:
        if isinstance(source, bytes):
            return upright_rgb(Image.open(io.BytesIO(source)))
        with _READING:
            return upright_rgb(source)
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{where}: its image cannot be decoded ({error})") from error


logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_NAMES = {str: "a text", int: "a number", list: "a list", dict: "an object", type(None): "null"}


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


def checked_field(record: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a record."""
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
        question_id = checked_field(record, "question_id", (str, int), where)
        image = checked_field(record, "image", (str, type(None)), where)
        text = checked_field(record, "text", str, where)
        images = () if image is None else (image_path(image, image_folder, where),)
        questions.append(Question(question_id, text, images))
    return questions


def chunk_of(items: Sequence[Item], num_chunks: int, chunk_idx: int) -> list[Item]:
    """Chunk `chunk_idx` of `num_chunks`: all of one size, rounded up, and the last ones smaller or empty."""
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
        checked_field(answer, "question_id", (str, int), where)
        checked_field(answer, "text", str, where)
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


def write_result(path: str | None, result: Mapping[str, Any], *inputs: str) -> None:
    """Writes a result as JSON where a path is given, but not over the inputs that it is made of."""
    if path:
        place = Path(path).expanduser()
        if place.resolve() in {Path(name).expanduser().resolve() for name in inputs}:
            raise FileExistsError(f"{path}: this command reads it too, it would be overwritten. Name another output.")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# A file of answers that a killed run leaves fit to be continued.
#
# Answers are written in the order of the questions, one JSON object a line, each at once. Beside them lies
# `ANSWERS.run.json`, which describes the run: questions, checkpoint, template and settings. A run of the same
# description goes on where the file ends; any other starts it anew, as upstream always does, and sets what it held
# aside as `ANSWERS.old`, `ANSWERS.old1` and so on. So answers of two runs never mix, and those of a checkpoint that
# has since been trained on are not taken for new ones. `ANSWERS.lock`, which is left behind, keeps a second process
# out: two would write their lines among each other's.


@contextmanager
def open_answers(
    path: str | Path, questions: Sequence[Question], model_id: str, run: Mapping[str, Any]
) -> Iterator[AnswersFile]:
    """A run's `AnswersFile`, into which no other process can answer as long as it is open."""
    place = Path(path).expanduser()
    if place.is_dir():
        raise IsADirectoryError(f"--answers-file {path}: found a folder, expected a file")
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        alone = FileLock(f"{place}.lock", timeout=0).acquire()
    except Timeout:
        raise BlockingIOError(
            f"--answers-file {path}: another process is answering into it; wait for its end, or name another file "
            "(each --chunk-idx has one of its own)"
        ) from None
    with alone:
        yield AnswersFile(place, questions, model_id, run)


class AnswersFile:
    """The file and what it holds already, for one process: see `open_answers`.

    Nothing is changed before the first answer is to be written.

    Args:
        path: of the answers.
        questions: all of this run, in order.
        model_id: written to each answer.
        run: describes checkpoint, template and settings; JSON values.

    Attributes:
        kept: how many of the questions, from the first on, are answered in the file.
    """

    def __init__(self, path: Path, questions: Sequence[Question], model_id: str, run: Mapping[str, Any]):
        self.path = path
        self.run_path = self.path.with_name(f"{self.path.name}.run.json")
        places = (self.path.with_name(f"{self.path.name}.old{number or ''}") for number in itertools.count())
        self.old_path = next(place for place in places if not place.exists())
        self.model_id = model_id
        description = {**run, "questions": hash_of_questions(questions), "number of questions": len(questions)}
        self.description = json.loads(json.dumps(description))
        self.kept_lines = self._kept_lines(questions)

    @property
    def kept(self) -> int:
        """Number of questions that need not be asked again."""
        return len(self.kept_lines)

    def _kept_lines(self, questions: Sequence[Question]) -> list[bytes]:
        if not self.path.is_file() or not self.path.stat().st_size:
            return []
        try:
            old = dict(json.loads(self.run_path.read_text(encoding="utf-8")))
        except (FileNotFoundError, TypeError, ValueError):
            return self._none_kept("nothing says which run its answers are from")
        if different := [key for key in self.description if old.get(key) != self.description[key]]:
            return self._none_kept(f"its answers are from a run that differs in: {', '.join(different)}")
        lines = complete_lines(self.path.read_bytes())
        ids = [json.loads(line).get("question_id") for line in lines]
        if ids != [question.question_id for question in questions[: len(ids)]]:
            return self._none_kept("its answers are not those of the first questions")
        logger.info("%s: %d of %d questions are answered already", self.path, len(lines), len(questions))
        return lines

    def _none_kept(self, reason: str) -> list[bytes]:
        logger.warning("%s is started anew, what it holds set aside as %s: %s", self.path, self.old_path, reason)
        return []

    @contextmanager
    def writer(self) -> Iterator[Callable[[Answer], None]]:
        """A function that appends an answer, as long as it is open. What is not kept is set aside or cut off first."""
        kept_bytes = sum(len(line) for line in self.kept_lines)
        if self.path.is_file() and b"\n" in self.path.read_bytes()[kept_bytes:]:  # more than a killed run's last line
            shutil.copyfile(self.path, self.old_path)
        if self.kept:
            os.truncate(self.path, kept_bytes)
        else:
            self.path.write_bytes(b"")  # before the description: no old answers are ever beside a new one
            write_json(self.run_path, self.description)
        with self.path.open("a", encoding="utf-8") as file:

            def write(answer: Answer) -> None:
                file.write(json.dumps(answer_line(answer, self.model_id)) + "\n")
                file.flush()

            yield write


def answer_line(answer: Answer, model_id: str) -> dict[str, Any]:
    """An answer with upstream's keys; `prompt` and a benchmark's own keys come from the question's metadata.

    The answer's id follows from question and model, where upstream draws one: runs can be compared byte by byte.
    """
    question = answer.question
    name = json.dumps([question.question_id, question.text, dict(question.metadata), model_id])
    return {
        "question_id": question.question_id,
        "prompt": question.text,
        "text": answer.text,
        **question.metadata,
        "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, name).hex,
        "model_id": model_id,
        "metadata": {},
    }


def complete_lines(content: bytes) -> list[bytes]:
    """Lines that were written whole: what a killed run was writing last is left out."""
    lines = []
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n") or not _is_object(line):
            break
        lines.append(line)
    return lines


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:  # also for bytes that are no text
        return False


def hash_of_questions(questions: Sequence[Question]) -> str:
    """SHA-256 over ids, texts, images' places (or bytes) and metadata, in order."""
    digest = hashlib.sha256()
    for question in questions:
        images = [
            hashlib.sha256(image).hexdigest() if isinstance(image, bytes)
            else str(Path(image).resolve() if isinstance(image, str | Path) else image)
            for image in question.images
        ]  # fmt: skip
        digest.update(json.dumps([question.question_id, question.text, images, dict(question.metadata)]).encode())
    return digest.hexdigest()


def model_hashes(name: str | None) -> dict[str, str] | str | None:
    """SHA-256 of the weights and configs of a checkpoint's folder, by file; a hub name is taken as it is."""
    if name is None or not Path(name).expanduser().is_dir():
        return name
    files = sorted(Path(name).expanduser().iterdir())
    chosen = [file for file in files if file.suffix in (".safetensors", ".bin") or file.name.endswith("config.json")]
    return {file.name: sha256(file) for file in chosen}
