"""Text prompts of Grounding DINO: tags in, prompts that fit its text encoder out, each token with the tag it is of.

A prompt is "person, tennis racket." The model takes 256 tokens at most, so many tags make several prompts; they are cut
between tags. A prompt always ends with a period: without one the last tag would belong to no block of the model's text
attention, and the result would depend on what the prompt is batched with.

With ", " a prompt is one block in which each tag sees the others, with ". " each tag is a block of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

PromptJoin = Literal[", ", ". "]

NO_TAG = -1
"""`Prompt.tag_of_token` of the tokens that join tags, and of those that frame the prompt."""

_END = "."
_FRAME_TOKENS = 3  # [CLS], the period at the end, [SEP]

# The model's code knows its delimiters by these ids of BERT's uncased vocabulary, whatever the tokenizer says.
_IDS_IN_THE_MODEL = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}


class PromptError(ValueError):
    """A tag that makes no prompt, or a tokenizer that isn't the model's."""


class Prompt(NamedTuple):
    """One text for one image.

    Attributes:
        text: lower-cased, ends with a period.
        tags: those in it, as they were given.
        input_ids: with [CLS] and [SEP].
        pieces: what each token reads as; continuations of a word begin with "##".
        tag_of_token: for each token the position of its tag in `tags`, or `NO_TAG`.
    """

    text: str
    tags: tuple[str, ...]
    input_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    tag_of_token: tuple[int, ...]


class PromptBuilder:
    """Makes prompts for one tokenizer."""

    def __init__(self, tokenizer: Any, *, join: PromptJoin = ", ", max_tokens: int = 256) -> None:
        """Checks the tokenizer.

        Args:
            tokenizer: BERT's uncased one, a fast one of transformers.
            join: between tags; the reference recipe joins with commas.
            max_tokens: of a prompt, with [CLS] and [SEP]; the model's `max_text_len`.

        Raises:
            PromptError: for a tokenizer with other delimiters than the model has, or another `join`.
        """
        if join not in get_args(PromptJoin):
            raise PromptError(
                f"prompt_join: found {join!r}, expected one of {', '.join(map(repr, get_args(PromptJoin)))}"
            )
        found = {token: tokenizer.convert_tokens_to_ids(token) for token in _IDS_IN_THE_MODEL}
        if found != _IDS_IN_THE_MODEL:
            raise PromptError(
                f"tokenizer: found the ids {found}, expected {_IDS_IN_THE_MODEL} of bert-base-uncased, which the "
                "model's code has built in. Is its vocab.txt that of the checkpoint?"
            )
        self._tokenizer = tokenizer
        self._join = join
        self._max_tokens = max_tokens

    def build(self, tags: Sequence[str]) -> list[Prompt]:
        """Prompts that have each tag once, in order. Tags that differ only in case or in blanks around count as one.

        Raises:
            PromptError: for a tag without words, or with more tokens than a prompt can have.
        """
        tag_of_name: dict[str, str] = {}
        for tag in tags:
            tag_of_name.setdefault(tag.strip().lower(), tag)
        return [self._prompt(names, [tag_of_name[name] for name in names]) for names in self._chunks(list(tag_of_name))]

    def _chunks(self, names: list[str]) -> Iterator[list[str]]:
        """Names in order, as many at a time as fit into a prompt."""
        if not names:
            return
        room = self._max_tokens - _FRAME_TOKENS
        counts = [len(ids) for ids in self._tokenizer(names, add_special_tokens=False)["input_ids"]]
        chunk: list[str] = []
        used = 0
        for name, count in zip(names, counts, strict=True):
            if not 0 < count <= room:
                raise PromptError(f"tag {name!r}: found {count} tokens, expected 1 to {room}. Correct the list of tags")
            if chunk and used + 1 + count > room:  # 1: what joins it is one token
                yield chunk
                chunk, used = [], 0
            used += count + (1 if chunk else 0)
            chunk.append(name)
        yield chunk

    def _prompt(self, names: list[str], tags: list[str]) -> Prompt:
        text = self._join.join(names) + _END
        tag_of_character = [NO_TAG] * len(text)
        start = 0
        for position, name in enumerate(names):
            tag_of_character[start : start + len(name)] = [position] * len(name)
            start += len(name) + len(self._join)
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        return Prompt(
            text=text,
            tags=tuple(tags),
            input_ids=tuple(ids),
            pieces=tuple(
                # What the vocabulary lacks still has its letters in the text.
                text[start:end] if token == self._tokenizer.unk_token_id else piece
                for token, piece, (start, end) in zip(
                    ids, self._tokenizer.convert_ids_to_tokens(ids), spans, strict=True
                )
            ),
            tag_of_token=tuple(tag_of_character[start] if end > start else NO_TAG for start, end in spans),
        )
