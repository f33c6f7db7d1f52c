"""From a dialogue to token ids and labels.

One mechanism serves every template. The template renders the dialogue as segments, of which the answers are marked
(`Conversation.segments`); the joined text is tokenised once, and a token is labelled if it touches an answer's
characters. Nothing is tokenised twice and no lengths are counted, so the labels are right for any tokenizer and any
text, also where an answer repeats the template's own separators.

`preprocess` and its siblings keep upstream's names and results. Where results differ, upstream's were defects:

- It dropped all labels of a sample on a miscount: answers that contain "ASSISTANT: ", an empty answer, and every
  dialogue in the `mpt` and ChatML templates. Here these are labelled like any other.
- In the `v0` templates its labels drifted by a token or more a turn, over roles and questions.
- Several `<image>` in one message became one. Here each keeps its place.
- An empty caption in a `plain` template was learnt as a line break. Here an empty answer is not learnt.

Letters: B dialogues, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llava import conversation as templates
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, Segment, SeparatorStyle
from llava.mm_utils import with_space_prefix

Turn = Mapping[str, str]
"""One message of a training record: `{"from": "human" | "gpt", "value": text}`."""


def preprocess(
    sources: Sequence[Sequence[Turn]],
    tokenizer: Any,
    has_image: bool = False,
    conversation: Conversation | None = None,
) -> dict[str, Tensor]:
    """Token ids and labels of dialogues.

    Args:
        sources: dialogues as they stand in training records.
        tokenizer: a fast tokenizer.
        has_image: whether `<image>` stands for an image; otherwise it is text like any other, and ids are cut at
            `tokenizer.model_max_length` (upstream parity: with images the collator cuts).
        conversation: the template; None means `llava.conversation.default_conversation` as it is now.

    Returns:
        `input_ids` and `labels`, int64 `[B, L]`, padded on the right.

    Raises:
        ValueError: for a dialogue whose turns do not fit the template, or a tokenizer without offsets.
    """
    template = templates.default_conversation if conversation is None else conversation
    rows = [tokenize_segments(training_segments(turns, template), tokenizer, has_image) for turns in sources]
    if not has_image:
        rows = [(ids[: tokenizer.model_max_length], labels[: tokenizer.model_max_length]) for ids, labels in rows]
    return {
        "input_ids": pad_rows([ids for ids, _ in rows], tokenizer.pad_token_id),
        "labels": pad_rows([labels for _, labels in rows], IGNORE_INDEX),
    }


def preprocess_multimodal(
    sources: Sequence[Sequence[Turn]], data_args: Any, conversation: Conversation | None = None
) -> list[list[dict[str, str]]]:
    """Dialogues with `<image>` where the model expects it; the dialogues given are left as they are.

    A single `<image>` of a message moves to its front, on a line of its own; several keep their places. Templates with
    "mmtag" in their version and `data_args.mm_use_im_start_end` put marks around each.
    """
    template = templates.default_conversation if conversation is None else conversation
    if not getattr(data_args, "is_multimodal", False):
        return [[dict(turn) for turn in turns] for turns in sources]
    mark = DEFAULT_IMAGE_TOKEN
    if getattr(data_args, "mm_use_im_start_end", False):
        mark = f"{DEFAULT_IM_START_TOKEN}{mark}{DEFAULT_IM_END_TOKEN}"
    if "mmtag" in template.version:
        mark = f"<Image>{mark}</Image>"
    return [[{**turn, "value": _place_images(turn["value"], mark)} for turn in turns] for turns in sources]


def preprocess_v1(
    sources: Sequence[Sequence[Turn]], tokenizer: Any, has_image: bool = False, conversation: Conversation | None = None
) -> dict[str, Tensor]:
    """`preprocess` for a template of style `TWO`; upstream's name."""
    return preprocess(sources, tokenizer, has_image, _of_style(conversation, SeparatorStyle.TWO))


def preprocess_llama_2(
    sources: Sequence[Sequence[Turn]], tokenizer: Any, has_image: bool = False, conversation: Conversation | None = None
) -> dict[str, Tensor]:
    """`preprocess` for a template of style `LLAMA_2`; upstream's name."""
    return preprocess(sources, tokenizer, has_image, _of_style(conversation, SeparatorStyle.LLAMA_2))


def preprocess_mpt(
    sources: Sequence[Sequence[Turn]], tokenizer: Any, has_image: bool = False, conversation: Conversation | None = None
) -> dict[str, Tensor]:
    """`preprocess` for a template of style `MPT`, also ChatML; upstream's name."""
    return preprocess(sources, tokenizer, has_image, _of_style(conversation, SeparatorStyle.MPT))


def preprocess_plain(
    sources: Sequence[Sequence[Turn]], tokenizer: Any, conversation: Conversation | None = None
) -> dict[str, Tensor]:
    """`preprocess` for a template of style `PLAIN`, always with images; upstream's name."""
    return preprocess(sources, tokenizer, True, _of_style(conversation, SeparatorStyle.PLAIN))


def training_segments(turns: Sequence[Turn], template: Conversation) -> Iterator[Segment]:
    """A training dialogue in the template, answers marked.

    Raises:
        ValueError: if the turns do not fit the template.
    """
    if template.sep_style is SeparatorStyle.PLAIN:
        return _plain_segments(turns, template)
    if template.sep_style is SeparatorStyle.SINGLE:
        return _single_segments(turns, template)
    dialogue = template.copy()
    # upstream parity: what the assistant says before the first question is dropped, and examples that belong to the
    # template are not trained on.
    asked = list(turns)[1:] if turns and turns[0]["from"] != "human" else list(turns)
    dialogue.messages = [[template.roles[speaker], turn["value"]] for speaker, turn in _alternating(asked)]
    return dialogue.segments()


def tokenize_segments(segments: Iterable[Segment], tokenizer: Any, has_image: bool) -> tuple[list[int], list[int]]:
    """Ids of the joined text, `IMAGE_TOKEN_INDEX` for each `<image>` if `has_image`, and labels of the same length.

    Ids are those of `llava.mm_utils.tokenizer_image_token`: pieces between images are tokenised each on its own, after
    one BOS if the tokenizer adds any.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__}: it gives no offsets, expected a fast one, from which labels are "
            "taken; load it with AutoTokenizer.from_pretrained(...), or convert it to tokenizer.json first"
        )
    text, in_answer = _join(segments)
    bos = tokenizer("").input_ids[:1]
    ids: list[int] = bos if bos == [tokenizer.bos_token_id] else []
    labels = [IGNORE_INDEX] * len(ids)
    start = 0
    for position, piece in enumerate(text.split(DEFAULT_IMAGE_TOKEN) if has_image else [text]):
        if position:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            start += len(DEFAULT_IMAGE_TOKEN)
        if piece:
            prefixed = with_space_prefix(piece, tokenizer)
            added = len(prefixed) - len(piece)
            encoded = tokenizer(prefixed, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for token, (first, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
                # A token without characters of its own (a space that the tokenizer puts first) goes with the next one.
                first = start + max(first - added, 0)
                end = max(start + end - added, first + 1)
                ids.append(token)
                labels.append(token if 1 in in_answer[first:end] else IGNORE_INDEX)
        start += len(piece)
    return ids, labels


def pad_rows(rows: Sequence[Sequence[int]], value: int | None) -> Tensor:
    """Rows of different lengths as one int64 tensor `[B, L]`, `value` on the right.

    Raises:
        ValueError: if rows need padding and `value` is None.
    """
    length = max((len(row) for row in rows), default=0)
    if value is None and any(len(row) < length for row in rows):
        raise ValueError("tokenizer.pad_token_id is None, expected an id to pad with; set tokenizer.pad_token first")
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def _of_style(conversation: Conversation | None, style: SeparatorStyle) -> Conversation:
    template = templates.default_conversation if conversation is None else conversation
    if template.sep_style is not style:
        raise ValueError(
            f"template of style {template.sep_style.name}, expected {style.name}; call `preprocess`, which takes any"
        )
    return template


def _place_images(text: str, mark: str) -> str:
    if text.count(DEFAULT_IMAGE_TOKEN) == 1:
        text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    return text.replace(DEFAULT_IMAGE_TOKEN, mark)


def _speaker(turn: Turn) -> int:
    """0 for the asker, 1 for the assistant."""
    if turn["from"] not in ("human", "gpt"):
        raise ValueError(f"field from: found {turn['from']!r}, expected 'human' or 'gpt'")
    return int(turn["from"] == "gpt")


def _alternating(turns: Sequence[Turn]) -> list[tuple[int, Turn]]:
    spoken = [(_speaker(turn), turn) for turn in turns]
    if not spoken or any(speaker != position % 2 for position, (speaker, _) in enumerate(spoken)):
        raise ValueError(
            f"field conversations: found turns {[turn['from'] for turn in turns]}, expected 'human' and 'gpt' by turns"
        )
    return spoken


def _plain_segments(turns: Sequence[Turn], template: Conversation) -> Iterator[Segment]:
    """Images and caption alone: the question is not shown to the model."""
    if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in turns[0]["value"]:
        raise ValueError(
            f"field conversations: found {len(turns)} turns, expected for a plain template two, the first with "
            f"{DEFAULT_IMAGE_TOKEN}; dialogues are trained with --version v1"
        )
    question, caption = turns[0]["value"], turns[1]["value"]
    yield Segment(DEFAULT_IMAGE_TOKEN * question.count(DEFAULT_IMAGE_TOKEN))
    yield Segment(caption + template.sep, supervised=bool(caption))


def _single_segments(turns: Sequence[Turn], template: Conversation) -> Iterator[Segment]:
    """The `v0` family trains on a layout with more line breaks than `get_prompt` has (upstream parity)."""
    yield Segment(f"{template.system}\n\n{template.sep} ")
    for turn in turns:
        speaker = _speaker(turn)
        yield Segment(f"{template.roles[speaker]}:")
        yield Segment(f" {turn['value']}\n{template.sep}", supervised=speaker == 1 and bool(turn["value"]))
        yield Segment(" ")


def _join(segments: Iterable[Segment]) -> tuple[str, bytearray]:
    """The whole text, and for each of its characters whether it belongs to an answer (1) or not (0)."""
    text, in_answer = "", bytearray()
    for segment in segments:
        text += segment.text
        in_answer += bytes([segment.supervised]) * len(segment.text)
    return text, in_answer
