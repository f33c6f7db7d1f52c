"""A whole model of transformers, of any family, that reads images: how likely it finds answers, and what it answers.

Letters: N continuations, C tokens of several continuations, M vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.checkpoint_files import may_be_hub_name
from patch_aligned.models.language import precise
from patch_aligned.models.llava import CAPTION_REQUEST

_ROWS_AT_ONCE = 9
"""Continuations that are read together, each with its own copy of what the LLM keeps of the prompt."""


def processor_of(place: str) -> Any:
    """Return the processor of a model, a folder or a hub name. Raises `FileNotFoundError` if it can be neither."""
    if not Path(place).is_dir() and not may_be_hub_name(place):
        raise FileNotFoundError(f"{place}: found no such folder; expected a model's folder, or its hub name OWNER/NAME")
    return AutoProcessor.from_pretrained(place)


@dataclass(frozen=True)
class TransformersSource:
    """Where a whole model of transformers is loaded from: a folder or hub name. Its weights keep their dtype."""

    place: str
    device: str

    def load(self) -> WholeModel:
        """Load it. Images stand alone in the prompt directly after stage 1, else the request for a caption follows."""
        processor = processor_of(self.place)
        model: Any = AutoModelForImageTextToText.from_pretrained(self.place, dtype="auto")
        request = "" if Path(self.place, "projector.safetensors").is_file() else CAPTION_REQUEST
        return WholeModel(model.to(self.device).eval(), processor, request)


class Prompt(NamedTuple):
    """An image and what the LLM keeps of it."""

    inputs: Any  # what the processor makes of the prompt
    cache: Any  # keys and values
    logits: Tensor  # of the next token, `[M]`


class WholeModel:
    """A model of transformers with its processor, and the prompt that its chat template writes around an image.

    `request` is what the user says after the image. Without a chat template the image stands alone.
    """

    def __init__(self, model: Any, processor: Any, request: str = CAPTION_REQUEST):
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.prompt, self._space = processor.image_token, ""
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, *([{"type": "text", "text": request}] if request else [])]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            if self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]:
                prompt = prompt.removeprefix(self.tokenizer.bos_token)  # the processor adds it
            self.prompt, self._space = prompt, "" if prompt[-1].isspace() else " "

    def answer_ids(self, text: str) -> list[int]:
        """Return the token ids of an answer as it stands behind the prompt."""
        length = len(self.tokenizer(self.prompt).input_ids)
        return self.tokenizer(self.prompt + self._space + text).input_ids[length:]

    @torch.inference_mode()
    def see(self, model: Any, images: Sequence[Image.Image]) -> Prompt:
        """Read a prompt with one image. Ask about it before the next: some models keep how they count its positions."""
        inputs = self.processor(text=[self.prompt], images=[list(images)], return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        read = self.model(**inputs, use_cache=True, logits_to_keep=1)
        return Prompt(inputs, read.past_key_values, read.logits[0, -1])

    @torch.inference_mode()
    def log_probabilities(self, seen: Prompt, stem: str, continuations: Sequence[Sequence[int]]) -> Tensor:
        """Return the log-probability of each continuation after image and stem, teacher forced: float64 `[1, N]`."""
        cache, next_logits = seen.cache, seen.logits
        if stem:
            logits, cache = self._read(cache, [self.answer_ids(stem)])
            next_logits = logits[0, -1]
        found = precise(next_logits).log_softmax(dim=-1)[[ids[0] for ids in continuations]].double()  # [N]
        longer = [number for number, ids in enumerate(continuations) if len(ids) > 1]
        for numbers in (longer[i : i + _ROWS_AT_ONCE] for i in range(0, len(longer), _ROWS_AT_ONCE)):
            logits, _ = self._read(cache, [continuations[number][:-1] for number in numbers])
            for number, row in zip(numbers, precise(logits), strict=True):  # [C, M]
                target = torch.tensor(continuations[number][1:], device=row.device)
                found[number] += row[: len(target)].log_softmax(dim=-1).gather(1, target[:, None]).double().sum()
        return found[None]

    def captions(self, seen: Prompt, max_new_tokens: int = 64) -> list[str]:
        """Return the greedy answer to the prompt."""
        ids = self.model.generate(**seen.inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        return [self.tokenizer.decode(ids[0, seen.inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()]

    def _read(self, cache: Any, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Any]:
        """Read token ids behind a prompt, which stays as it is: logits `[rows, C, M]`, and the longer prompt."""
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(rows))
        # Padding stands on the right, where no token sees it.
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.model.device)  # [rows, C]
        read = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        return read.logits, read.past_key_values
