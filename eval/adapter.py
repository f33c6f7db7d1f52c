"""lmms-eval's own `llava` adapter, loaded with a checkpoint; its code stays as it is shipped."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model


class PreflightError(ValueError):
    """Everything that is in the way of a run, a line each."""


# Answers, appended as they come, so that a stopped run can resume.
#
# lmms-eval's own cache keeps a task's answers only once all of them are there, and knows a model by its address in
# memory.

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


# Characters that neither text nor spreadsheet holds. A model in a bad way says them, and MMBench's file for the server,
# an Excel sheet, would end a run whose answers are all there.
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelRequest:
    """Which checkpoint to load, and how.

    Attributes:
        path: a folder.
        base: what an adapter or a projector belongs to, or None.
        name: of the checkpoint.
        conversation: name of the template.
        dtype: one of `DTYPES`.
        batch_size: rows a call.
    """

    path: str
    base: str | None
    name: str
    conversation: str
    dtype: str
    batch_size: int


def default_dtype() -> str:
    """Of the weights, where nothing else is asked: float16 on a GPU, float32 on a CPU."""
    return "float16" if torch.cuda.is_available() else "float32"


def load_adapter(request: ModelRequest) -> Any:
    """lmms-eval's `Llava` with our checkpoint in it, and with `log` and `first_prompt` beside.

    Set `log` to an `AnswerLog` before each task. `first_prompt` is afterwards the prompt of this process's first row.
    """
    from lmms_eval.models.simple import llava as shipped

    class LoggedLlava(shipped.Llava):
        """Answers as shipped, but keeps them, and keeps the model from one task to the next."""

        log: AnswerLog | None = None
        first_prompt: str = ""

        def clean(self) -> None:
            """As shipped, this deletes the model after the first task."""

        def generate_until(self, requests: list[Any]) -> list[str]:
            self.first_prompt = self._prompt(min(requests, key=lambda request: request.args[3]))
            self._refuse_padding_in(self.first_prompt)
            assert self.log is not None
            own_ratio = "image_aspect_ratio" in self._config.__dict__
            block = max(1, BLOCK_ROWS // self.batch_size) * self.batch_size
            answers = self.log.answer(requests, super().generate_until, self._order, block)
            if not own_ratio:  # a task's own wish, which would stay for the tasks after it
                self._config.__dict__.pop("image_aspect_ratio", None)
            return [_CONTROLS.sub("", answer) for answer in answers]

        def _order(self, request: Any) -> Any:
            return -len(self.tok_encode(request.args[0])), request.args[0]

        def _refuse_padding_in(self, prompt: str) -> None:
            """The shipped code masks each token that is the padding's: the model would not see it."""
            tokenizer = self.tokenizer
            padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            if padding in tokenizer_image_token(prompt, tokenizer):
                raise PreflightError(
                    f"{request.path}: the prompt holds {tokenizer.decode(padding)!r}, with which lmms-eval pads, and "
                    "the model would not see it; next: name another pad_token in the checkpoint's tokenizer_config.json"
                )

        def _prompt(self, request: Any) -> str:
            """The prompt of a request, as the shipped code puts it together."""
            context, _, doc_to_visual, row, task, split = request.args
            pictures = doc_to_visual(self.task_dict[task][split][row])
            if pictures and DEFAULT_IMAGE_TOKEN not in context:
                context = " ".join([DEFAULT_IMAGE_TOKEN] * len(pictures)) + "\n" + context
            conversation = conv_templates[self.conv_template].copy()
            conversation.append_message(conversation.roles[0], context)
            conversation.append_message(conversation.roles[1], None)
            return conversation.get_prompt()

    place = {"device": "cuda:0"} if torch.cuda.is_available() else {"device": "cpu", "device_map": "auto"}
    with _our_loader(shipped, request):
        return LoggedLlava(
            pretrained=request.path,
            model_name=request.name,
            conv_template=request.conversation,
            batch_size=request.batch_size,
            **place,
        )


@contextmanager
def _our_loader(shipped: Any, request: ModelRequest) -> Iterator[None]:
    """Gives the loader what the adapter has no argument for: the base and the dtype."""

    def load(path: str, _: None, name: str, **options: Any) -> Any:
        try:
            return load_pretrained_model(path, request.base, name, dtype=DTYPES[request.dtype], **options)
        except TypeError as error:  # the adapter takes it for an old loader, hides it and loads a second time
            raise RuntimeError(f"{path}: {error}") from error

    before = getattr(shipped, "load_pretrained_model", None)
    shipped.load_pretrained_model = load
    try:
        yield
    finally:
        shipped.load_pretrained_model = before


# One process a GPU, as `accelerate launch` or torchrun start them: what the first decides, all do.

T = TypeVar("T")


def rank_and_count() -> tuple[int, int]:
    """Number of this process, and how many there are; (0, 1) for a process that nothing launched."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def processes_here(count: int) -> int:
    """How many of `count` processes run on this machine, which is what its GPUs must suffice for."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count))


def shared(value: T) -> T:
    """The first process's value, in all of them; what the others give does not matter. All wait for it."""
    if rank_and_count()[1] == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # One process may have far more left to do than another. Without a word on CPUs, accelerate takes each process of
    # theirs for the only one.
    PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(weeks=52))
    (first,) = broadcast_object_list([value])
    return first


def wait_for_all() -> None:
    """Goes on when all processes have come here."""
    shared(None)
