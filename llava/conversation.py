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
from dataclasses import dataclass, replace
from enum import Enum, auto
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from llava.constants import DEFAULT_IMAGE_TOKEN

if TYPE_CHECKING:
    from PIL.Image import Image


class SeparatorStyle(Enum):
    """How turns of a dialogue are set apart. The first five are upstream's; the others have LLaVA-NeXT's names."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()
    LLAMA_3 = auto()
    CHATML = auto()


class Segment(NamedTuple):
    """A piece of a prompt.

    Attributes:
        text: the piece, to be joined without anything in between.
        supervised: whether the model is to produce it: an answer with the separator that closes it.
    """

    text: str
    supervised: bool = False


# Texts that open the conversation templates, character by character as checkpoints were trained on them.

POLITE_TO_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)

POLITE_TO_USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)

LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)

SEES_TAGGED_IMAGES = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks using "
    "natural language.The visual content will be provided with the following format: <Image>visual "
    "content</Image>."
)

SEES_IMAGES = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)

MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)

EXAMPLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"

EXAMPLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of "
    "time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other "
    "hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key "
    "differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
    "are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and other "
    "negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have "
    "lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
    "than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
    "sources are not, and their depletion can lead to economic and social instability.\n"
)

QWEN_2_SYSTEM = "You are a helpful assistant."

QWEN_2_5_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@dataclass
class Conversation:
    """A dialogue and its template. Copy an entry of `conv_templates` and append messages.

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
        """Yield the prompt in pieces, with answers marked."""
        texts = [(role, message[0] if isinstance(message, tuple) else message) for role, message in self._messages()]
        turns = [(role, text, number % 2 == 1) for number, (role, text) in enumerate(texts)]
        match self.sep_style:
            case SeparatorStyle.SINGLE | SeparatorStyle.TWO:  # "ROLE: text" and a separator; TWO has one for each side
                closing = (self.sep2 or "") if self.sep_style is SeparatorStyle.TWO else self.sep
                yield Segment(self.system + self.sep)
                for role, text, is_answer in turns:
                    yield Segment(f"{role}:")
                    if text:
                        yield Segment(f" {text}{closing if is_answer else self.sep}", supervised=is_answer)
            case SeparatorStyle.MPT:  # also ChatML: roles bring their own opening mark and line break
                yield Segment(self.system + self.sep)
                for role, text, is_answer in turns:
                    yield Segment(role)
                    if text:
                        yield Segment(text + self.sep, supervised=is_answer)
            case SeparatorStyle.PLAIN:  # texts and separators, no roles
                yield Segment(self.system)
                for _, text, is_answer in turns:
                    if text:
                        yield Segment(text + (self.sep2 or self.sep if is_answer else self.sep), supervised=is_answer)
            case SeparatorStyle.LLAMA_2:  # the system text is in the first "[INST]"; the tokenizer adds the first "<s>"
                if turns and (not turns[0][1] or turns[0][0] != self.roles[0]):
                    raise ValueError(
                        f"a LLAMA_2 conversation starts with text of {self.roles[0]!r}, found {turns[0][:2]!r}"
                    )
                opening = f"[INST] <<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else "[INST] "
                for _, text, is_answer in turns:
                    if text and is_answer:
                        yield Segment(f" {text} {self.sep2}", supervised=True)
                    elif text:
                        yield Segment(f"{opening}{text} [/INST]")
                    opening = f"{self.sep}[INST] "
            case SeparatorStyle.LLAMA_3 | SeparatorStyle.CHATML:  # roles bring a header; no system turn without a text
                # Texts are trimmed, as Llama 3's own template does: a line break at the start of an answer would become
                # one token with the header's, which is in the prompt already at inference.
                line_break = "\n" if self.sep_style is SeparatorStyle.CHATML else ""
                if self.system:
                    yield Segment(self.system + self.sep + line_break)
                for role, text, is_answer in turns:
                    yield Segment(role)
                    if trimmed := (text or "").strip():
                        yield Segment(trimmed + self.sep, supervised=is_answer)
                        yield Segment(line_break)
            case unknown:
                raise ValueError(f"sep_style: found {unknown!r}, expected one of {[s.name for s in SeparatorStyle]}")

    def get_prompt(self) -> str:
        """Return the dialogue as one string, which ends where the model continues if the last turn is open."""
        return "".join(segment.text for segment in self.segments())

    @property
    def stop_string(self) -> str:
        """The text that ends an answer, and with it generation."""
        return self.sep2 if self.sep2 and self.sep_style is not SeparatorStyle.SINGLE else self.sep

    def append_message(self, role: str, message: Any) -> None:
        """Append a turn."""
        self.messages.append([role, message])

    def _messages(self) -> list[tuple[str, Any]]:
        """Return the messages, with the image of the first one, if it has one, as text."""
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
        """Return a picture, or its base64 text in `image_format`, to be shown or sent.

        The mode is "Pad" (centred on a square of CLIP's mean colour), "Default" or "Crop" (as it is), or "Resize"
        (336 x 336). If a side is longer than `max_len` pixels, the picture is made smaller, the shortest side at most
        `min_len`.
        """
        if image_process_mode == "Pad":
            from llava.mm_utils import expand2square

            colour = (122, 116, 104)
            image = expand2square(image, colour if len(image.getbands()) == 3 else colour[0])
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
        """Return the images of the asker's messages, prepared by `process_image`."""
        asked = [message for _, message in self.messages[self.offset :][::2]]
        return [self.process_image(m[1], m[2], return_pil=return_pil) for m in asked if isinstance(m, tuple)]

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """Return pairs of question and answer for a chat window, with images as HTML."""
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
        """Return a copy with its own messages."""
        return replace(self, messages=[[role, message] for role, message in self.messages])

    def dict(self) -> Mapping[str, Any]:
        """Return the fields as JSON values; of messages with an image, the text."""
        messages = [[role, message[0] if isinstance(message, tuple) else message] for role, message in self.messages]
        fields = ("system", "roles", "messages", "offset", "sep", "sep2")
        return {name: getattr(self, name) for name in fields} | {"messages": messages}


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


_example = (("Human", EXAMPLE_QUESTION), ("Assistant", EXAMPLE_ANSWER))
_v0 = Conversation(POLITE_TO_HUMAN, ("Human", "Assistant"), _example, 2)
_v1 = _vicuna(POLITE_TO_USER)
_chatml_direct = _chatml("Answer the questions.")

conv_templates: dict[str, Conversation] = {
    "default": _v0,
    "v0": _v0,
    "v1": _v1,
    "vicuna_v1": _v1,
    "llama_2": _llama_2(LLAMA_2_SYSTEM),
    "mistral_instruct": _llama_2("", sep=""),
    "chatml_direct": _chatml_direct,
    "mistral_direct": _chatml_direct,
    "plain": _plain(),
    "v0_plain": _plain(),
    "llava_v0": Conversation(POLITE_TO_HUMAN, ("Human", "Assistant"), (), 0),
    "v0_mmtag": Conversation(SEES_TAGGED_IMAGES, ("Human", "Assistant"), (), 0, version="v0_mmtag"),
    "llava_v1": _vicuna(POLITE_TO_HUMAN),
    "v1_mmtag": _vicuna(SEES_TAGGED_IMAGES, "v1_mmtag"),
    "llava_llama_2": _llama_2(SEES_IMAGES),
    "mpt": _chatml(MPT_SYSTEM),
    # Up to here upstream's. The following carry LLaVA-NeXT's names and texts, but for `qwen_3`.
    "llava_llama_3": _llama_3(SEES_IMAGES),
    "qwen_1_5": _qwen(QWEN_2_SYSTEM),
    "qwen_2": _qwen(QWEN_2_SYSTEM),
    "qwen_2_5": _qwen(QWEN_2_5_SYSTEM),
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
    """Return the template of a name, or raise `ValueError` with all names and the nearest one."""
    if mode not in conv_templates:
        near = difflib.get_close_matches(mode, conv_templates, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--conv-mode {mode}: no such template; {hint}There are {', '.join(sorted(conv_templates))}")
    return conv_templates[mode]


def conversation_mode(model_name: str, config: Any) -> str:
    """Return the name of a checkpoint's template.

    The config's `conversation_version`, which training writes, comes first, then `plain` for stage 1, for which
    upstream records nothing, then the config's `model_type`, then the name (of `get_model_name_from_path`). The last
    resort is `mistral_instruct` for Mistral, and `llava_v0` for other LLMs.
    """
    version = getattr(config, "conversation_version", None)
    if version in conv_templates:
        return version
    if getattr(config, "tune_mm_mlp_adapter", False):
        return "plain"
    model_type = getattr(config, "model_type", None)
    if model_type in MODEL_TYPE_RULES:
        return MODEL_TYPE_RULES[model_type]
    fallback = "mistral_instruct" if model_type == "llava_mistral" else "llava_v0"
    return next((mode for part, mode in NAME_RULES if part in model_name.lower()), fallback)


default_conversation = _v1
"""For code that names no template, as upstream's scripts; this package always passes one explicitly."""
