"""Convert a conversation template to a Jinja chat template that gives the same token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.mm_utils import tokenizer_image_token

# Stand-ins that a rendered dialogue is cut at, to find what a template writes between its parts.
_SYSTEM, _QUESTION, _ANSWER = "(((system)))", "(((question)))", "(((answer)))"

_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{{- BEFORE_SYSTEM -}}
{%- if messages[0]['content'] is string -%}{{- messages[0]['content'] -}}
{%- else -%}{{- messages[0]['content'][0]['text'] -}}{%- endif -%}
{{- AFTER_SYSTEM -}}
{%- set turns = messages[1:] -%}
{%- else -%}
{{- START -}}
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Turns of user and assistant must alternate, the user first.') -}}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{- BEFORE_ANSWER -}}
{%- elif not loop.first -%}{{- BEFORE_QUESTION -}}{%- endif -%}
{%- set whole = namespace(text='') -%}
{%- if message['content'] is string -%}{%- set whole.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] if part['type'] in ['image', 'image_url'] -%}
{%- set whole.text = whole.text + IMAGE -%}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{%- set whole.text = whole.text + part['text'] -%}
{%- endfor -%}
{%- endif -%}
{{- whole.text | TRIM -}}
{%- endfor -%}
{%- if turns and turns[-1]['role'] == 'assistant' -%}{{- END -}}
{%- elif add_generation_prompt -%}{{- PROMPT_FOR_ANSWER -}}{%- endif -%}
"""


def layout_of(conversation: Conversation) -> dict[str, str]:
    """Return what a template writes around the texts of a dialogue, by name in `_TEMPLATE`.

    It is derived from rendered dialogues, which works for every separator style.
    """
    asker, assistant = conversation.roles
    closed = [(asker, _QUESTION), (assistant, _ANSWER), (asker, _QUESTION), (assistant, _ANSWER)]
    start, before_answer, before_question, _, end = re.split(
        f"{re.escape(_QUESTION)}|{re.escape(_ANSWER)}", _rendered(conversation, closed)
    )
    prompt_for_answer = _rendered(conversation, [(asker, _QUESTION), (assistant, None)]).split(_QUESTION)[1]
    # "<|im_start|>system" and its like open the block and stay; the text after them is what a caller may replace.
    header = asker.replace("user", "system") if asker.startswith("<|") else ""
    other = conversation.copy()
    other.system = header + _SYSTEM
    opening = _rendered(other, closed).split(_QUESTION)[0]
    before_system, _, after_system = opening.partition(_SYSTEM)
    trims = f" {_QUESTION}" not in _rendered(conversation, [(asker, f"\n {_QUESTION}")])
    return {
        "START": start,
        "BEFORE_SYSTEM": before_system,
        "AFTER_SYSTEM": after_system,
        "BEFORE_ANSWER": before_answer,
        "BEFORE_QUESTION": before_question,
        "PROMPT_FOR_ANSWER": prompt_for_answer,
        "END": end,
        "TRIM": " | trim" if trims else "",
    }


def image_text(conversation: Conversation, has_start_and_end: bool, gap: str) -> str:
    """Return the text of an image before a question, with the marks that the checkpoint was trained with."""
    mark = DEFAULT_IMAGE_TOKEN + gap
    if has_start_and_end:
        mark = f"{DEFAULT_IM_START_TOKEN}{DEFAULT_IMAGE_TOKEN}{gap}{DEFAULT_IM_END_TOKEN}"
    return f"<Image>{mark}</Image>\n" if "mmtag" in conversation.version else f"{mark}\n"


def chat_template(conversation: Conversation, tokenizer: Any, has_start_and_end: bool = False) -> str:
    """Return a Jinja template whose prompts have the ids that `tokenizer_image_token` gives for `conversation`.

    The template writes the BOS token itself, if the tokenizer has one: serving engines tokenise the result of a chat
    template without adding any. A SentencePiece tokenizer treats text after a token such as `<image>` or BOS as the
    middle of a sentence, where LLaVA tokenises it as a beginning; a space after the token compensates. All combinations
    are tried, and `ValueError` is raised if none gives the same ids. `tokenizer` has `<image>` among its tokens.
    """
    layout = layout_of(conversation)
    image_id = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    dialogues = [_probe(conversation, image_text(conversation, has_start_and_end, ""), turns) for turns in (1, 2)]
    expected = [
        [image_id if i == IMAGE_TOKEN_INDEX else i for i in tokenizer_image_token(text, tokenizer)]
        for text in dialogues
    ]
    bos = tokenizer.bos_token
    found: list[int] = []
    for opening, gap in product(["", *([bos, f"{bos} "] if bos else [])], ("", " ")):
        image = image_text(conversation, has_start_and_end, gap)
        texts = [opening + _probe(conversation, image, turns) for turns in (1, 2)]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        if ids == expected:
            return _filled(layout, opening, image)
        found = ids[0]
    raise ValueError(
        f"The conversation template has no counterpart in Jinja with this tokenizer ({type(tokenizer).__name__}): "
        f"expected the ids {expected[0]}, found {found}. Choose another with --conv-mode."
    )


def _probe(conversation: Conversation, image: str, turns: int) -> str:
    asker, assistant = conversation.roles
    messages: list[tuple[str, str | None]] = [(asker, f"{image}What is this?"), (assistant, None)]
    if turns == 2:
        messages = [messages[0], (assistant, "A cat."), (asker, "And what colour?"), (assistant, None)]
    return _rendered(conversation, messages)


def _rendered(conversation: Conversation, messages: Sequence[tuple[str, str | None]]) -> str:
    dialogue = conversation.copy()
    for role, text in messages:
        dialogue.append_message(role, text)
    return dialogue.get_prompt()


def _filled(layout: dict[str, str], opening: str, image: str) -> str:
    texts = layout | {"IMAGE": image} | {name: opening + layout[name] for name in ("START", "BEFORE_SYSTEM")}
    template = _TEMPLATE.replace(" | TRIM", texts.pop("TRIM"))
    return re.sub(r"\b[A-Z_]{3,}\b", lambda match: json.dumps(texts[match[0]]), template)
