"""How turns of a dialogue are set apart: each style writes them as the pieces of a prompt, answers marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from llava.conversation import Conversation


class SeparatorStyle(Enum):
    """The names of the styles. The first five are upstream's; the others carry LLaVA-NeXT's names."""

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


Turns = list[tuple[str, "str | None"]]


def _render_named(conversation: Conversation, turns: Turns) -> Iterator[Segment]:
    """`SINGLE` and `TWO`: "ROLE: text" and a separator; `TWO` has one for each side."""
    separators = (conversation.sep, conversation.sep)
    if conversation.sep_style is SeparatorStyle.TWO:
        separators = (conversation.sep, conversation.sep2 or "")
    yield Segment(conversation.system + separators[0])
    for position, (role, text) in enumerate(turns):
        yield Segment(f"{role}:")
        if text:
            yield Segment(f" {text}{separators[position % 2]}", supervised=position % 2 == 1)


def _render_mpt(conversation: Conversation, turns: Turns) -> Iterator[Segment]:
    """`MPT`, also ChatML: roles bring their own opening mark and line break."""
    yield Segment(conversation.system + conversation.sep)
    for position, (role, text) in enumerate(turns):
        yield Segment(role)
        if text:
            yield Segment(text + conversation.sep, supervised=position % 2 == 1)


def _render_llama_2(conversation: Conversation, turns: Turns) -> Iterator[Segment]:
    """`LLAMA_2`: "[INST] ... [/INST]", the system text inside the first one; the tokenizer adds the first "<s>"."""
    if turns and (not turns[0][1] or turns[0][0] != conversation.roles[0]):
        raise ValueError(f"a LLAMA_2 conversation starts with text of {conversation.roles[0]!r}, found {turns[0]!r}")
    system = f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n" if conversation.system else ""
    for position, (_, text) in enumerate(turns):
        if not text:
            continue
        if position % 2:
            yield Segment(f" {text} {conversation.sep2}", supervised=True)
        else:
            opening = f"[INST] {system}" if position == 0 else f"{conversation.sep}[INST] "
            yield Segment(f"{opening}{text} [/INST]")


def _render_plain(conversation: Conversation, turns: Turns) -> Iterator[Segment]:
    """`PLAIN`: texts and separators, no roles."""
    yield Segment(conversation.system)
    separators = (conversation.sep, conversation.sep2 or conversation.sep)
    for position, (_, text) in enumerate(turns):
        if text:
            yield Segment(text + separators[position % 2], supervised=position % 2 == 1)


def _render_headed(conversation: Conversation, turns: Turns) -> Iterator[Segment]:
    """`LLAMA_3` and `CHATML`: roles bring a header of their own; without a system text there is no system turn.

    Texts are trimmed, as Llama 3's own template does: a line break at an answer's start would become one token with
    the header's, which at inference stands there already. ChatML breaks the line after each turn.
    """
    line_break = "\n" if conversation.sep_style is SeparatorStyle.CHATML else ""
    if conversation.system:
        yield Segment(conversation.system + conversation.sep + line_break)
    for position, (role, text) in enumerate(turns):
        yield Segment(role)
        if trimmed := (text or "").strip():
            yield Segment(trimmed + conversation.sep, supervised=position % 2 == 1)
            yield Segment(line_break)


RENDERERS: dict[SeparatorStyle, Callable[[Conversation, Turns], Iterator[Segment]]] = {
    SeparatorStyle.SINGLE: _render_named,
    SeparatorStyle.TWO: _render_named,
    SeparatorStyle.MPT: _render_mpt,
    SeparatorStyle.PLAIN: _render_plain,
    SeparatorStyle.LLAMA_2: _render_llama_2,
    SeparatorStyle.LLAMA_3: _render_headed,
    SeparatorStyle.CHATML: _render_headed,
}
