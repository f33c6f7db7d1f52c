"""Conversation templates: how turns of a dialogue become one prompt, and which parts of it are answers.

A template renders its messages as `Segment`s. `get_prompt` joins their text; training labels the supervised ones. So
what a model learns to say starts exactly where its prompt ends at inference: after "ASSISTANT:", not after the space
that follows it.

Template texts and field names are upstream's: checkpoints were trained on them, character by character.
"""

from __future__ import annotations

import base64
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from llava import system_prompts
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.separator_styles import RENDERERS, Segment, SeparatorStyle

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Conversation:
    """A dialogue and the template it is written in. Copy an entry of `conv_templates` and append messages.

    Attributes:
        system: text before the first turn.
        roles: names of the asker and of the assistant, as the template spells them.
        messages: `[role, text]` in order. A text of None or "" leaves the turn open, for the model to fill; a tuple
            `(text, image, mode)` carries an image, see `process_image`.
        offset: how many leading messages are examples that belong to the template.
        sep_style, sep, sep2: what closes the turns.
        version: family name by which training code chooses; "mmtag" in it puts tags around images.
        skip_next: read by chat servers, unused here.
    """

    system: str
    roles: tuple[str, str]
    messages: Any
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def segments(self) -> Iterator[Segment]:
        """The prompt in pieces, answers marked.

        Raises:
            ValueError: for an unknown style, or a `LLAMA_2` conversation that does not start with the asker's text.
        """
        if self.sep_style not in RENDERERS:
            raise ValueError(f"sep_style: found {self.sep_style!r}, expected one of {[s.name for s in SeparatorStyle]}")
        turns = [(role, message[0] if isinstance(message, tuple) else message) for role, message in self._messages()]
        return RENDERERS[self.sep_style](self, turns)

    def get_prompt(self) -> str:
        """The dialogue as one string, ending where the model is to go on if the last turn is open."""
        return "".join(segment.text for segment in self.segments())

    @property
    def stop_string(self) -> str:
        """What closes an answer: generation that has written it is done."""
        return self.sep2 if self.sep2 and self.sep_style is not SeparatorStyle.SINGLE else self.sep

    def append_message(self, role: str, message: Any) -> None:
        """Adds a turn at the end."""
        self.messages.append([role, message])

    def _messages(self) -> list[tuple[str, Any]]:
        """Messages with the image of the first one, if it carries one, written as text."""
        messages = [(role, message) for role, message in self.messages]
        if not messages or not isinstance(messages[0][1], tuple):
            return messages
        role, (text, *_) = messages[0]
        text = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" in self.version:
            received = [(self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"), (self.roles[1], "Received.")]
            return [*received, (role, text), *messages[1:]]
        return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *messages[1:]]

    def process_image(
        self,
        image: Image,
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ) -> Image | str:
        """Prepares an image for display or for sending: shaped by mode, and made smaller if longer than `max_len`.

        Args:
            image: the picture.
            image_process_mode: "Pad" (centred on a square of CLIP's mean colour), "Default" or "Crop" (as it is),
                "Resize" (336 x 336).
            return_pil: return the picture instead of its base64 text.
            image_format: file format inside the base64 text.
            max_len: longest side allowed, pixels.
            min_len: shortest side after making it smaller, pixels, at most.

        Raises:
            ValueError: for another mode.
        """
        if image_process_mode == "Pad":
            image = _centred_on_square(image, (122, 116, 104))
        elif image_process_mode == "Resize":
            image = image.resize((336, 336))
        elif image_process_mode not in ("Default", "Crop"):
            raise ValueError(f"image_process_mode: found {image_process_mode!r}, expected Pad, Default, Crop or Resize")
        longest, shortest = max(image.size), min(image.size)
        if longest > max_len:
            ratio = longest / shortest
            shortest = int(min(max_len / ratio, min_len, shortest))
            longest = int(shortest * ratio)
            width, height = image.size
            image = image.resize((shortest, longest) if height > width else (longest, shortest))
        if return_pil:
            return image
        buffer = BytesIO()
        image.save(buffer, format=image_format)
        return base64.b64encode(buffer.getvalue()).decode()

    def get_images(self, return_pil: bool = False) -> list[Image | str]:
        """Images of the asker's messages, prepared by `process_image`."""
        asked = [message for _, message in self.messages[self.offset :][::2]]
        return [self.process_image(m[1], m[2], return_pil=return_pil) for m in asked if isinstance(m, tuple)]

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """Pairs of question and answer, images as HTML, as a chat window shows them."""
        pairs: list[list[str | None]] = []
        for position, (_, message) in enumerate(self.messages[self.offset :]):
            if position % 2:
                pairs[-1][1] = message
            elif isinstance(message, tuple):
                text, image, mode = message
                encoded = self.process_image(image, mode, image_format="JPEG")
                picture = f'<img src="data:image/jpeg;base64,{encoded}" alt="user upload image" />'
                pairs.append([picture + text.replace(DEFAULT_IMAGE_TOKEN, "").strip(), None])
            else:
                pairs.append([message, None])
        return pairs

    def copy(self) -> Conversation:
        """A conversation of its own: appending to it leaves this one as it is."""
        messages = [[role, message] for role, message in self.messages]
        return Conversation(
            self.system, self.roles, messages, self.offset, self.sep_style, self.sep, self.sep2, self.version
        )

    def dict(self) -> Mapping[str, Any]:
        """Fields that can be written as JSON; of messages with an image, the text."""
        messages = [[role, message[0] if isinstance(message, tuple) else message] for role, message in self.messages]
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": messages,
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


def _centred_on_square(image: Image, colour: tuple[int, int, int]) -> Image:
    from PIL import Image

    side = max(image.size)
    square = Image.new(image.mode, (side, side), colour if len(image.getbands()) == 3 else colour[0])
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _llama_2(system: str, sep: str = "<s>") -> Conversation:
    return Conversation(system, ("USER", "ASSISTANT"), (), 0, SeparatorStyle.LLAMA_2, sep, "</s>", "llama_v2")


def _vicuna(system: str, version: str = "v1") -> Conversation:
    return Conversation(system, ("USER", "ASSISTANT"), (), 0, SeparatorStyle.TWO, " ", "</s>", version)


def _chatml(system: str) -> Conversation:
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return Conversation(f"<|im_start|>system\n{system}", roles, (), 0, SeparatorStyle.MPT, "<|im_end|>", version="mpt")


def _llama_3(system: str) -> Conversation:
    headers = [f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", "user", "assistant")]
    style = SeparatorStyle.LLAMA_3
    return Conversation(headers[0] + system, (headers[1], headers[2]), (), 0, style, "<|eot_id|>", version="llama_v3")


def _qwen(system: str) -> Conversation:
    opening = f"<|im_start|>system\n{system}" if system else ""
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    return Conversation(opening, roles, (), 0, SeparatorStyle.CHATML, "<|im_end|>", version="qwen")


def _plain() -> Conversation:
    return Conversation("", ("", ""), (), 0, SeparatorStyle.PLAIN, "\n")


_example = (("Human", system_prompts.EXAMPLE_QUESTION), ("Assistant", system_prompts.EXAMPLE_ANSWER))
_v0 = Conversation(system_prompts.POLITE_TO_HUMAN, ("Human", "Assistant"), _example, 2)
_v1 = _vicuna(system_prompts.POLITE_TO_USER)
_chatml_direct = _chatml("Answer the questions.")

conv_templates: dict[str, Conversation] = {
    "default": _v0,
    "v0": _v0,
    "v1": _v1,
    "vicuna_v1": _v1,
    "llama_2": _llama_2(system_prompts.LLAMA_2_SYSTEM),
    "mistral_instruct": _llama_2("", sep=""),
    "chatml_direct": _chatml_direct,
    "mistral_direct": _chatml_direct,
    "plain": _plain(),
    "v0_plain": _plain(),
    "llava_v0": Conversation(system_prompts.POLITE_TO_HUMAN, ("Human", "Assistant"), (), 0),
    "v0_mmtag": Conversation(system_prompts.SEES_TAGGED_IMAGES, ("Human", "Assistant"), (), 0, version="v0_mmtag"),
    "llava_v1": _vicuna(system_prompts.POLITE_TO_HUMAN),
    "v1_mmtag": _vicuna(system_prompts.SEES_TAGGED_IMAGES, "v1_mmtag"),
    "llava_llama_2": _llama_2(system_prompts.SEES_IMAGES),
    "mpt": _chatml(system_prompts.MPT_SYSTEM),
    # Up to here upstream's. The following carry LLaVA-NeXT's names and texts, but for `qwen_3`.
    "llava_llama_3": _llama_3(system_prompts.SEES_IMAGES),
    "qwen_1_5": _qwen(system_prompts.QWEN_2_SYSTEM),
    "qwen_2": _qwen(system_prompts.QWEN_2_SYSTEM),
    "qwen_2_5": _qwen(system_prompts.QWEN_2_5_SYSTEM),
    "qwen_3": _qwen(""),  # Qwen3 has no system text of its own
}
"""Every template by name. Shared by the whole process: `copy` before appending."""

MODEL_TYPE_RULES = {"llava_qwen": "qwen_2", "llava_qwen3": "qwen_3"}
"""For checkpoints that do not say what they were trained with: `model_type` of the config, template."""

NAME_RULES = (
    ("llama-2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("v1.6-34b", "chatml_direct"),
    ("llama-3", "llava_llama_3"),
    ("llama3", "llava_llama_3"),
    ("v1", "llava_v1"),
    ("mpt", "mpt"),
)
"""Where the type does not decide: part of the checkpoint's name, template. Upstream's rules, and Llama 3."""


def template_named(mode: str) -> Conversation:
    """The template of that name.

    Raises:
        ValueError: there is none; the message lists them, and says which is nearest.
    """
    if mode not in conv_templates:
        near = difflib.get_close_matches(mode, conv_templates, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--conv-mode {mode}: no such template; {hint}There are {', '.join(sorted(conv_templates))}")
    return conv_templates[mode]


def conversation_mode(model_name: str, config: Any) -> str:
    """Name of the template to talk to a checkpoint in.

    Args:
        model_name: of the checkpoint, as `get_model_name_from_path` gives it.
        config: the model's; `conversation_version` in it, which training writes, comes first, then its `model_type`,
            then the name. A Mistral whose name says nothing gets `mistral_instruct`, any other LLM `llava_v0`.
    """
    version = getattr(config, "conversation_version", None)
    if version in conv_templates:
        return version
    model_type = getattr(config, "model_type", None)
    if model_type in MODEL_TYPE_RULES:
        return MODEL_TYPE_RULES[model_type]
    fallback = "mistral_instruct" if model_type == "llava_mistral" else "llava_v0"
    return next((mode for part, mode in NAME_RULES if part in model_name.lower()), fallback)


default_conversation = _v1
"""Read only by code that names no template, as upstream's scripts do; this package always passes one explicitly."""
