"""Captions by a checkpoint: one question an image, asked by the loop that all of this package's answers come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from eval.adapter import DTYPES
from eval.captions.answer_file import CaptionLog
from eval.captions.references import CaptionedImage
from eval.checkpoint import own_conversation, read_llava_config
from llava.conversation import SeparatorStyle, conv_templates
from llava.eval.answering import GenerationSettings, Question, answer_questions, prompt_of
from llava.model.builder import load_pretrained_model
from patch_aligned.results.run_file import ModelIdentity

WORKERS = 4


@dataclass(frozen=True)
class Writer:
    """Who writes captions, and how it is asked. Greedy, so nothing is drawn.

    Attributes:
        model: checkpoint and base.
        conversation: name of the template.
        prompt: what the model is told to do; nothing under a `plain` template, where captions follow their image.
        mm_use_im_start_end: whether the checkpoint wants marks around its images.
        dtype: one of `DTYPES`.
        max_new_tokens: where a caption is cut off.
    """

    model: ModelIdentity
    conversation: str
    prompt: str
    mm_use_im_start_end: bool
    dtype: str
    max_new_tokens: int

    @property
    def identity(self) -> str:
        """Changes with everything that a caption depends on."""
        parts = [
            self.model.sha256,
            self.model.base,
            self.model.base_sha256,
            self.conversation,
            self.prompt,
            self.dtype,
            self.max_new_tokens,
            version("patch-aligned-llava"),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def full_prompt(self) -> str:
        """What the model is given, the same for all images."""
        question = Question("", self.prompt, ("",))
        return prompt_of(question, conv_templates[self.conversation], self.mm_use_im_start_end)


def describe_writer(
    model: ModelIdentity, conversation: str | None, prompt: str | None, dtype: str, max_new_tokens: int, default: str
) -> Writer:
    """Fills in what the checkpoint decides.

    Args:
        model: checkpoint and base.
        conversation: name of the template; None is the checkpoint's own.
        prompt: what the user wants the model to be told; None is `default`, or nothing under a `plain` template.
        dtype: one of `DTYPES`.
        max_new_tokens: where a caption is cut off.
        default: the prompt where the template takes one.
    """
    config = read_llava_config(model.path, model.base)
    conversation = conversation or own_conversation(model.path, config)
    if prompt is None:
        is_plain = conv_templates[conversation].sep_style is SeparatorStyle.PLAIN
        prompt = "" if is_plain else default
    with_marks = bool(getattr(config, "mm_use_im_start_end", False))
    return Writer(model, conversation, prompt, with_marks, dtype, max_new_tokens)


def write_captions(
    writer: Writer,
    images: Sequence[CaptionedImage],
    files: Mapping[str, Path],
    log: CaptionLog,
    batch_size: int,
    device: str,
    show_progress: bool = True,
) -> None:
    """Captions images and keeps each caption in `log`.

    Args:
        writer: who, and how.
        images: those without a caption so far.
        files: where each image is, by its id.
        log: keeps the captions.
        batch_size: images at once; captions do not depend on it.
        device: "cpu", "cuda:0", ...
        show_progress: a bar on standard error.

    Raises:
        UnreadableImageError: an image is broken; it is named, and what was written before is kept.
    """
    tokenizer, model, image_processor, _ = load_pretrained_model(
        writer.model.path, writer.model.base, writer.model.name, device=device, dtype=DTYPES[writer.dtype]
    )
    answers = answer_questions(
        [Question(image.id, writer.prompt, (files[image.id],)) for image in images],
        tokenizer,
        model,
        image_processor,
        conv_templates[writer.conversation],
        GenerationSettings(max_new_tokens=writer.max_new_tokens),
        batch_size=batch_size,
        workers=WORKERS,
    )
    with tqdm(total=len(images), unit="caption", disable=not show_progress) as bar:
        for answer in answers:
            log.keep(str(answer.question.question_id), answer.text)
            bar.update()


def device_of(local_rank: int) -> str:
    """Where a process of a machine runs.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    count = torch.cuda.device_count()
    if count and local_rank >= count:
        raise ValueError(
            f"process {local_rank + 1} has no GPU of its own; next: accelerate launch --num_processes {count}"
        )
    return f"cuda:{local_rank}" if count else "cpu"
