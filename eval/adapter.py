"""lmms-eval's own `llava` adapter, loaded with a checkpoint; its code stays as it is shipped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from eval.answer_log import BLOCK_ROWS, AnswerLog
from eval.preflight import PreflightError
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model

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
