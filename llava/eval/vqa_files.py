"""Files of questions and answers, checked before any model is loaded."""

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

# Questions about images, their answers, and their prompts in a template.

ImageSource = str | Path | bytes | Image.Image
"""A path, the bytes of an image file, or a picture."""

_READING = Lock()
"""PIL opens images lazily and is not thread-safe while doing so."""


@dataclass(frozen=True)
class Question:
    """A question about images or text.

    Attributes:
        question_id: identifies the answer.
        text: may place its images by `<image>`; otherwise they come first, each on its own line.
        images: empty for a question about text.
        metadata: values of the caller, returned with the answer.

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
    """An answer of a model: its text is without special tokens, the template's closing mark and outer white space."""

    question: Question
    prompt: str  # in full, with template and `<image>`
    text: str


def prompt_of(question: Question, conversation: Conversation, mm_use_im_start_end: bool = False) -> str:
    """Return the question in the template, with an open turn for the answer.

    A plain template gives the images and then the text, without a break, as stage 1 trains captions. An empty text asks
    for a caption.
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
    """Raise `FileNotFoundError` naming the first missing image file, its question, and how many are missing."""
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
    """Read an image as RGB. `where` names it in errors if it has no path. Threads may share one picture.

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
    """Read the objects of a JSON lines file, without empty lines. `what` describes the content in errors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not a JSON object; the message names it.
    """
    records = []
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); expected one object a line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: found {_NAMES.get(type(record), 'a value')}, expected an object")
        records.append(record)
    return records


def read_json(path: str | Path, what: str, kind: type) -> Any:
    """Read a JSON file whose value is of `kind`. `what` describes the content in errors."""
    try:
        value = json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); expected {what}") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: found {_NAMES.get(type(value), 'a value')}, expected {_NAMES[kind]}: {what}")
    return value


def read_text(path: str | Path, what: str) -> str:
    """Read a UTF-8 file, without a byte order mark. `what` describes the content in errors."""
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {what}")
    try:
        return place.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); expected {what}") from None


def checked_field(record: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return a field of a record, or raise `ValueError` if it is missing or of another kind."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(_NAMES.get(k, k.__name__) for k in kinds)
    if name not in record:
        raise ValueError(f"{where}: no field `{name}` (there are {', '.join(record) or 'none'}); expected {expected}")
    if not isinstance(record[name], kinds) or isinstance(record[name], bool):
        raise ValueError(f"{where}, field `{name}`: found {record[name]!r}, expected {expected}")
    return record[name]


def image_path(name: str, image_folder: str | Path, where: str) -> Path:
    """Return the path of a record's image, which must not leave the image folder, if one is given."""
    path = Path(name)
    if str(image_folder) and (path.anchor or ".." in path.parts):
        raise ValueError(
            f"{where}, field `image`: {name} leads out of --image-folder {image_folder}; write it relative"
        )
    return Path(image_folder).expanduser() / path


def vqa_questions(path: str | Path, image_folder: str | Path) -> list[Question]:
    """Read questions of LLaVA's JSONL: `question_id`, `image` (null for a question about text alone) and `text`.

    Ids may repeat: in MME and TextVQA they name the image.
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
    """Return chunk `chunk_idx` of `num_chunks`: all of one size, rounded up, and the last ones smaller or empty."""
    if not 0 <= chunk_idx < num_chunks:
        raise ValueError(f"--chunk-idx {chunk_idx}: expected 0 to {num_chunks - 1}, as --num-chunks is {num_chunks}")
    size = math.ceil(len(items) / num_chunks)
    return list(items[chunk_idx * size : (chunk_idx + 1) * size])


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """Read the answers that the commands here write: `question_id`, `prompt` and `text`. Warns of empty ones."""
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
    """Check that each question has exactly one answer; `path` and `questions` name the two files in errors."""
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
            f"{next(iter(missing))!r}; run the command that answers them again, it continues where it stopped"
        )


def write_result(path: str | None, result: Mapping[str, Any], *inputs: str) -> None:
    """Write a result as JSON if a path is given, but never over one of the inputs."""
    if path:
        place = Path(path).expanduser()
        if place.resolve() in {Path(name).expanduser().resolve() for name in inputs}:
            raise FileExistsError(f"{path}: this command reads it too, it would be overwritten. Name another output.")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# How answers are generated.


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of generation.

    Attributes:
        temperature: 0 is greedy; above, tokens are sampled.
        top_p: sample from the likeliest tokens with this share of the probability; None for all. The limits of the
            generation config apply too: by default, transformers samples from the 50 likeliest.
        num_beams: width of the beam search; 1 is none.
        max_new_tokens: maximum length of an answer.
        seed: of the sampling, together with the first question of each batch.
    """

    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature: found {self.temperature}, expected 0 (greedy) or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: found {self.top_p}, expected more than 0 and at most 1")
        require_positive(num_beams=self.num_beams, max_new_tokens=self.max_new_tokens)

    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        return {
            "do_sample": self.temperature > 0,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            **sampling,
        }


def require_positive(**counts: int) -> None:
    """Raise `ValueError` naming the first of `counts` that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: found {count}, expected 1 or more")


# A resumable file of answers.
#
# Answers are appended in the order of the questions, one JSON object a line. `ANSWERS.run.json` beside them describes
# the run: questions, checkpoint, template and settings. A run of the same description continues at the end of the file.
# Any other starts from the first question, as upstream always does, and renames the old file to `ANSWERS.old`,
# `ANSWERS.old1` and so on: answers of two runs, or of two states of a checkpoint, never mix. `ANSWERS.lock`, which
# stays, keeps out a second process, whose lines would be written in between.


@contextmanager
def open_answers(
    path: str | Path, questions: Sequence[Question], model_id: str, run: Mapping[str, Any]
) -> Iterator[AnswersFile]:
    """Open the `AnswersFile` of a `run` (checkpoint, template, settings: JSON values), locked against other processes.

    `questions` are all of the run, in order; `model_id` is written to each answer.
    """
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
    """A file of answers, of which the first `kept` are of this run. Nothing is changed before `writer` opens it."""

    def __init__(self, path: Path, questions: Sequence[Question], model_id: str, run: Mapping[str, Any]):
        self.path, self.model_id = path, model_id
        self.run_path = self.path.with_name(f"{self.path.name}.run.json")
        places = (self.path.with_name(f"{self.path.name}.old{number or ''}") for number in itertools.count())
        self.old_path = next(place for place in places if not place.exists())
        description = {**run, "questions": hash_of_questions(questions), "number of questions": len(questions)}
        self.description = json.loads(json.dumps(description))
        self.kept_lines = self._kept_lines(questions)
        self.kept = len(self.kept_lines)

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
        logger.warning(
            "%s starts from the first question, its content moves to %s: %s", self.path, self.old_path, reason
        )
        return []

    @contextmanager
    def writer(self) -> Iterator[Callable[[Answer], None]]:
        """Yield a function that appends an answer, after moving or cutting off what is not kept."""
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
    """Return an answer with upstream's keys; the question's metadata may replace `prompt` and add keys.

    The id is a hash of question and model, where upstream draws one, so that runs can be compared byte by byte.
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
    """Return the complete lines, without the one that a killed run was writing."""
    lines = []
    for line in content.splitlines(keepends=True):
        try:
            is_object = line.endswith(b"\n") and isinstance(json.loads(line), dict)
        except ValueError:  # also for bytes that are not text
            is_object = False
        if not is_object:
            break
        lines.append(line)
    return lines


def hash_of_questions(questions: Sequence[Question]) -> str:
    """SHA-256 over ids, texts, paths of images (or their bytes) and metadata, in order."""
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
    """SHA-256 of the weights and configs in a checkpoint's folder, by file; a hub name is returned unchanged."""
    if name is None or not Path(name).expanduser().is_dir():
        return name
    files = sorted(Path(name).expanduser().iterdir())
    chosen = [file for file in files if file.suffix in (".safetensors", ".bin") or file.name.endswith("config.json")]
    return {file.name: sha256(file) for file in chosen}
