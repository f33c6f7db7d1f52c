"""Questions about images, their answers, and the prompts that a template makes of them."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle
from llava.mm_utils import UnreadableImageError, load_rgb_image, require_image_tokens

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
    """Checks that all image files are there.

    Raises:
        FileNotFoundError: naming the first that is not, its question, and how many there are.
    """
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
            return Image.open(io.BytesIO(source)).convert("RGB")
        with _READING:
            source.load()
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{where}: its image cannot be decoded ({error})") from error
    return source if source.mode == "RGB" else source.convert("RGB")
