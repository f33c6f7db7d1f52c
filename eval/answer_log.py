"""Answers kept as they come, so that a run that was stopped goes on where it was.

lmms-eval's own cache keeps a task's answers only once all of them are there, and knows a model by its address in
memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

BLOCK_ROWS = 256


class AnswerLog:
    """Answers of one run, in files of a folder: each process writes its own, and reads all."""

    def __init__(self, folder: Path, identity: dict[str, Any], rank: int = 0) -> None:
        """Opens the log.

        Args:
            folder: of the log; made with the first answer.
            identity: what answers depend on besides the request: weights, template, precision, data.
            rank: of this process.
        """
        self._identity = json.dumps(identity, sort_keys=True)
        self._path = folder / f"answers-{rank}.jsonl"
        self._shows_progress = rank == 0
        self._known: dict[str, str] = {}
        for path in sorted(folder.glob("answers-*.jsonl")):
            self._read(path)

    def answer(
        self, requests: Sequence[Any], ask: Callable[[list[Any]], list[str]], order: Callable[[Any], Any], block: int
    ) -> list[str]:
        """Answers to requests in their order: the known ones, and those that `ask` gives to the rest.

        Args:
            requests: of lmms-eval, with `args` (context, generation settings, ..., row, task, split).
            ask: answers several requests.
            order: key that the rest is sorted by, so that blocks hold the same batches as the whole would.
            block: how many are asked, and kept, at a time.
        """
        # Taken before asking: the adapter writes into the settings of its requests.
        keys = [self._key(request) for request in requests]
        unknown = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        missing = sorted(unknown, key=lambda key: order(unknown[key]))
        # lmms-eval's own bar is of one block alone.
        with tqdm(total=len(missing), unit="answer", disable=not self._shows_progress or len(missing) <= block) as bar:
            for start in range(0, len(missing), block):
                part = missing[start : start + block]
                answers = ask([unknown[key] for key in part])
                self._keep(dict(zip(part, answers, strict=True)))
                bar.update(len(part))
        return [self._known[key] for key in keys]

    def _key(self, request: Any) -> str:
        context, settings, _, row, task, split = request.args
        parts = [self._identity, context, settings, row, task, split]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _keep(self, answers: dict[str, str]) -> None:
        self._known |= answers
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="ascii") as stream:
            stream.writelines(json.dumps([key, answer]) + "\n" for key, answer in answers.items())

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the last line of a process that was killed may be cut
        self._known |= dict(json.loads(line) for line in whole.splitlines())
        if path == self._path and whole != content:  # or the next line would be glued to it
            os.truncate(path, len(whole))
