"""Load lmms-eval's own `llava` adapter with a checkpoint, and log its answers. Its code is used unchanged."""

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

from tqdm import tqdm

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token


class PreflightError(ValueError):
    """Raised for problems that prevent a run, one per line."""


class JsonLog:
    """Append-only JSON lines in `folder/name-RANK.jsonl`: each process writes its own file and reads all of them."""

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        self._path = folder / f"{name}-{rank}.jsonl"
        self._others = sorted(folder.glob(f"{name}-*.jsonl"))

    def read(self) -> Iterator[tuple[Path, int, Any]]:
        """Yield file, line number and value of each line. A last line that was cut off is removed."""
        for path in self._others:
            content = path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]  # a killed process may leave a partial line
            for number, line in enumerate(complete.splitlines(), start=1):
                try:
                    yield path, number, json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: found no JSON; next: delete the file") from error
            if path == self._path and complete != content:  # or the next line would continue the partial one
                os.truncate(path, len(complete))  # other processes may be reading the lines that stay

    def append(self, *values: Any) -> None:
        """Write values, a line each."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="ascii") as stream:
            stream.writelines(json.dumps(value) + "\n" for value in values)


# lmms-eval's own cache stores a task's answers only after the whole task, and identifies a model by its memory address.

BLOCK_ROWS = 256


class AnswerLog:
    """Answers of one benchmark, stored as they come, so that a stopped run can resume.

    `identity` is what answers depend on besides the request: weights, template, precision, data.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], rank: int = 0) -> None:
        self._identity = json.dumps(identity, sort_keys=True)
        self._shows_progress = rank == 0
        self._log = JsonLog(folder, "answers", rank)
        self._known: dict[str, str] = dict(line for _, _, line in self._log.read())

    def answer(
        self, requests: Sequence[Any], ask: Callable[[list[Any]], list[str]], order: Callable[[Any], Any], block: int
    ) -> list[str]:
        """Return answers to lmms-eval's requests in order; `ask` gives those that are not stored, `block` at a time.

        Blocks are sorted by `order`, so that they are batched as the whole task would be.
        """
        # Before asking, since the adapter writes to the settings of its requests.
        keys = [self._key(request) for request in requests]
        unknown = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        missing = sorted(unknown, key=lambda key: order(unknown[key]))
        # lmms-eval's own progress bar shows a single block.
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
        self._log.append(*answers.items())


# Control characters, which a badly trained model may generate. MMBench's submission file, an Excel sheet, cannot hold
# them and would fail after all answers are given.
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class ModelRequest:
    """Which checkpoint to load, and how."""

    path: str
    base: str | None  # the language model of an adapter or a projector
    name: str
    conversation: str  # name of the template
    dtype: str  # one of `DTYPES`
    batch_size: int  # rows per call


def default_dtype() -> str:
    """Default type of the weights: float16 on a GPU, float32 on a CPU."""
    import torch

    return "float16" if torch.cuda.is_available() else "float32"


def load_adapter(request: ModelRequest) -> Any:
    """Return lmms-eval's `Llava` with our checkpoint and the attributes `log` and `first_prompt`.

    Set `log` to an `AnswerLog` before each task. Afterwards `first_prompt` is the prompt of this process's first row.
    """
    import torch
    from lmms_eval.models.simple import llava as shipped

    class LoggedLlava(shipped.Llava):
        """Answers as shipped, but logs answers, and keeps the model for the next task."""

        log: AnswerLog | None = None
        first_prompt: str = ""

        def clean(self) -> None:
            """Do nothing: the shipped method deletes the model after the first task."""

        def generate_until(self, requests: list[Any]) -> list[str]:
            self.first_prompt = self._prompt(min(requests, key=lambda request: request.args[3]))
            self._refuse_padding_in(self.first_prompt)
            assert self.log is not None
            own_ratio = "image_aspect_ratio" in self._config.__dict__
            block = max(1, BLOCK_ROWS // self.batch_size) * self.batch_size
            answers = self.log.answer(requests, super().generate_until, self._order, block)
            if not own_ratio:  # set by a task, and would remain for later tasks
                self._config.__dict__.pop("image_aspect_ratio", None)
            return [_CONTROLS.sub("", answer) for answer in answers]

        def _order(self, request: Any) -> Any:
            return -len(self.tok_encode(request.args[0])), request.args[0]

        def _refuse_padding_in(self, prompt: str) -> None:
            """The shipped code masks all tokens equal to the padding token, also in the prompt."""
            tokenizer = self.tokenizer
            padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
            if padding in tokenizer_image_token(prompt, tokenizer):
                raise PreflightError(
                    f"{request.path}: the prompt holds {tokenizer.decode(padding)!r}, with which lmms-eval pads, and "
                    "the model would not see it; next: name another pad_token in the checkpoint's tokenizer_config.json"
                )

        def _prompt(self, request: Any) -> str:
            """The prompt of a request, built as in the shipped code."""
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
    """Pass base and dtype to the loader, for which the adapter has no arguments."""
    from llava.model.builder import load_pretrained_model

    def load(path: str, _: None, name: str, **options: Any) -> Any:
        try:
            return load_pretrained_model(path, request.base, name, dtype=request.dtype, **options)
        except TypeError as error:  # the adapter would assume an old loader, hide the error and load again
            raise RuntimeError(f"{path}: {error}") from error

    before = getattr(shipped, "load_pretrained_model", None)
    shipped.load_pretrained_model = load
    try:
        yield
    finally:
        shipped.load_pretrained_model = before


# One process per GPU, as started by `accelerate launch` or torchrun. The first process decides for all.

T = TypeVar("T")


def rank_and_count() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def processes_here(count: int) -> int:
    """How many of `count` processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count))


def shared(value: T) -> T:
    """Return the first process's value in all processes; the values of the others are ignored. All wait for it."""
    if rank_and_count()[1] == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    # A long timeout, since one process may have far more left to do than another. Without `cpu`, accelerate treats each
    # process on CPUs as the only one.
    PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(weeks=52))
    (first,) = broadcast_object_list([value])
    return first


def wait_for_all() -> None:
    """Block until all processes have reached this call."""
    shared(None)
