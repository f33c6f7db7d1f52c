"""Convert dialogues to token ids and labels.

All templates share one mechanism. The template renders the dialogue as segments with answers marked
(`Conversation.segments`). The joined text is tokenised once, and a token is labelled if it overlaps an answer's
characters. Nothing is tokenised twice and no lengths are counted. So labels are correct for any tokenizer and text,
even if an answer contains the template's separators.

`preprocess` and its variants keep upstream's names and results, except for its defects: docs/differences.md lists what
it labelled wrongly, or not at all. An empty caption in a `plain` template, which it learned as a line break, is not
learned here.

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
    """Tokenise dialogues and label their answers.

    Args:
        sources: dialogues as in training records.
        tokenizer: a fast tokenizer.
        has_image: whether `<image>` represents an image. Otherwise it is plain text, and ids are truncated to
            `tokenizer.model_max_length` (upstream parity: with images the collator truncates).
        conversation: the template. Default: the current `llava.conversation.default_conversation`.

    Returns:
        `input_ids` and `labels`, int64 `[B, L]`, padded on the right.

    Raises:
        ValueError: for a dialogue whose turns do not match the template, or a tokenizer without offsets.
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
    """Return copies of dialogues with `<image>` in the position that the model expects.

    A single `<image>` of a message moves to its beginning, on its own line; several keep their positions. Templates
    with "mmtag" in their version and `data_args.mm_use_im_start_end` add tokens around each.
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


def preprocess_independent_turns(
    dialogue: Sequence[Turn], tokenizer: Any, conversation: Conversation, data_args: Any
) -> dict[str, Tensor]:
    """Tokenise each question of a dialogue as a dialogue of its own, and join them after their common prefix.

    The prefix ends with the image. Returns `input_ids`, `labels` and `turns`, int64 `[L]`: the number of the question
    that each token belongs to, from 1, and 0 in the prefix; the model reads it to keep questions apart.
    """
    marks = [turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in dialogue]
    if marks[:1] != [1] or sum(marks) != 1:
        raise ValueError(
            f"field conversations: found {sum(marks)} {DEFAULT_IMAGE_TOKEN} in {len(marks)} turns, expected one, in "
            "the first turn, before the questions of --independent_turns True"
        )
    first_question = dialogue[0]["value"].replace(DEFAULT_IMAGE_TOKEN, "").strip()
    questions = [first_question, *(turn["value"] for turn in dialogue[2::2])]
    sources = [
        [{**dialogue[2 * number], "value": f"{DEFAULT_IMAGE_TOKEN}\n{question}"}, *dialogue[2 * number + 1 :][:1]]
        for number, question in enumerate(questions)
    ]
    ids: list[int] = []
    labels: list[int] = []
    turns: list[int] = []
    for number, turns_of_one in enumerate(preprocess_multimodal(sources, data_args, conversation), start=1):
        own_ids, own_labels = tokenize_segments(training_segments(turns_of_one, conversation), tokenizer, True)
        start = own_ids.index(IMAGE_TOKEN_INDEX) + 1 if ids else 0
        if own_labels[start] != IGNORE_INDEX:
            raise ValueError(
                "an answer directly after the image would follow another answer; expected a template with questions, "
                "such as --version v1, for --independent_turns True"
            )
        ids += own_ids[start:]
        labels += own_labels[start:]
        turns += [number] * (len(own_ids) - start)
    prefix = ids.index(IMAGE_TOKEN_INDEX) + 1
    turns[:prefix] = [0] * prefix
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "turns": torch.tensor(turns)}


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
    """Render a training dialogue in the template, with answers marked."""
    if template.sep_style is SeparatorStyle.PLAIN:
        return _plain_segments(turns, template)
    if template.sep_style is SeparatorStyle.SINGLE:
        return _single_segments(turns, template)
    dialogue = template.copy()
    # upstream parity: a message of the assistant before the first question is dropped, and the template's own examples
    # are not trained on.
    asked = list(turns)[1:] if turns and turns[0]["from"] != "human" else list(turns)
    dialogue.messages = [[template.roles[speaker], turn["value"]] for speaker, turn in _alternating(asked)]
    return dialogue.segments()


def tokenize_segments(segments: Iterable[Segment], tokenizer: Any, has_image: bool) -> tuple[list[int], list[int]]:
    """Tokenise the joined text, with `IMAGE_TOKEN_INDEX` for each `<image>` if `has_image`. Returns ids and labels.

    Ids equal those of `llava.mm_utils.tokenizer_image_token`: the pieces between images are tokenised separately, after
    one BOS if the tokenizer adds one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__}: it gives no offsets, which labels need; expected a fast tokenizer; "
            "load it with AutoTokenizer.from_pretrained(...), or convert it to tokenizer.json first"
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
                # A token without characters of its own (a space that the tokenizer prepends) belongs to the next one.
                first = start + max(first - added, 0)
                end = max(start + end - added, first + 1)
                ids.append(token)
                labels.append(token if 1 in in_answer[first:end] else IGNORE_INDEX)
        start += len(piece)
    return ids, labels


def pad_rows(rows: Sequence[Sequence[int]], value: int | None) -> Tensor:
    """Pad rows with `value` on the right to one int64 tensor `[B, L]`."""
    length = max((len(row) for row in rows), default=0)
    if value is None and any(len(row) < length for row in rows):
        raise ValueError("tokenizer.pad_token_id is None, expected an id to pad with; set tokenizer.pad_token first")
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def _of_style(conversation: Conversation | None, style: SeparatorStyle) -> Conversation:
    template = templates.default_conversation if conversation is None else conversation
    if template.sep_style is not style:
        raise ValueError(
            f"template of style {template.sep_style.name}, expected {style.name}; call `preprocess`, which accepts any"
        )
    return template


def _place_images(text: str, mark: str) -> str:
    if text.count(DEFAULT_IMAGE_TOKEN) == 1:
        text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    return text.replace(DEFAULT_IMAGE_TOKEN, mark)


def _speaker(turn: Turn) -> int:
    """Return 0 for the user, 1 for the assistant."""
    if turn["from"] not in ("human", "gpt"):
        raise ValueError(f"field from: found {turn['from']!r}, expected 'human' or 'gpt'")
    return int(turn["from"] == "gpt")


def _alternating(turns: Sequence[Turn]) -> list[tuple[int, Turn]]:
    spoken = [(_speaker(turn), turn) for turn in turns]
    if not spoken or any(speaker != position % 2 for position, (speaker, _) in enumerate(spoken)):
        raise ValueError(
            f"field conversations: found turns {[turn['from'] for turn in turns]}, expected 'human' and 'gpt' in turn"
        )
    return spoken


def _plain_segments(turns: Sequence[Turn], template: Conversation) -> Iterator[Segment]:
    """Yield images and caption only: the model does not see the question."""
    if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in turns[0]["value"]:
        raise ValueError(
            f"field conversations: found {len(turns)} turns, expected two for a plain template, the first with "
            f"{DEFAULT_IMAGE_TOKEN}; train dialogues with --version v1"
        )
    question, caption = turns[0]["value"], turns[1]["value"]
    yield Segment(DEFAULT_IMAGE_TOKEN * question.count(DEFAULT_IMAGE_TOKEN))
    yield Segment(caption + template.sep, supervised=bool(caption))


def _single_segments(turns: Sequence[Turn], template: Conversation) -> Iterator[Segment]:
    """Yield the `v0` family's training format, with more line breaks than `get_prompt` has (upstream parity)."""
    yield Segment(f"{template.system}\n\n{template.sep} ")
    for turn in turns:
        speaker = _speaker(turn)
        yield Segment(f"{template.roles[speaker]}:")
        yield Segment(f" {turn['value']}\n{template.sep}", supervised=speaker == 1 and bool(turn["value"]))
        yield Segment(" ")


def _join(segments: Iterable[Segment]) -> tuple[str, bytearray]:
    """Return the joined text, and for each character whether it belongs to an answer (1) or not (0)."""
    text, in_answer = "", bytearray()
    for segment in segments:
        text += segment.text
        in_answer += bytes([segment.supervised]) * len(segment.text)
    return text, in_answer
