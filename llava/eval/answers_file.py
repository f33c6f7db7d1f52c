"""A file of answers that a killed run leaves fit to be continued.

Answers are written in the order of the questions, one JSON object a line, each at once. Beside them lies
`ANSWERS.run.json`, which describes the run: questions, checkpoint, template and settings. A run of the same description
goes on where the file ends; any other starts it anew, as upstream always does, and sets what it held aside as
`ANSWERS.old`. So answers of two runs never mix, and those of a checkpoint that has since been trained on are not taken
for new ones. `ANSWERS.lock`, which is left behind, keeps a second process out: two would write their lines among each
other's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llava.eval.questions import Answer, Question

logger = logging.getLogger(__name__)


@contextmanager
def open_answers(
    path: str | Path, questions: Sequence[Question], model_id: str, run: Mapping[str, Any]
) -> Iterator[AnswersFile]:
    """A run's `AnswersFile`, into which no other process can answer as long as it is open.

    Raises:
        BlockingIOError: another process has it open.
        OSError: it is a folder, or nothing can be written there.
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
        self.old_path = self.path.with_name(f"{self.path.name}.old")
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
        if self.kept:
            os.truncate(self.path, sum(len(line) for line in self.kept_lines))
        else:
            if self.path.is_file() and b"\n" in self.path.read_bytes():  # more than a killed run's first line
                self.path.replace(self.old_path)
            self.path.write_bytes(b"")  # before the description: no old answers are ever beside a new one
            temporary = self.run_path.with_name(f"{self.run_path.name}.tmp")
            temporary.write_text(json.dumps(self.description, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.run_path)
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
    """SHA-256 over ids, texts, images' names (or bytes) and metadata, in order."""
    digest = hashlib.sha256()
    for question in questions:
        images = [hashlib.sha256(i).hexdigest() if isinstance(i, bytes) else str(i) for i in question.images]
        digest.update(json.dumps([question.question_id, question.text, images, dict(question.metadata)]).encode())
    return digest.hexdigest()


def stamps_of(folder: str | None) -> dict[str, list[int]]:
    """Size and time of change of each file of a checkpoint's folder; empty for a hub name."""
    if folder is None or not Path(folder).expanduser().is_dir():
        return {}
    files = sorted(path for path in Path(folder).expanduser().iterdir() if path.is_file())
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
