"""Single tokens of an LLM's vocabulary as text that can be shown: one token, on its own, made visible."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

REPLACEMENT = "\ufffd"
_WORD_MARKS = ("\u2581", "\u0120")  # of SentencePiece and of byte-level BPE: a space comes before the token
_VISIBLE = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True)
class TokenText:
    """A token as it is shown.

    Attributes:
        text: without the space in front of a word. White space and control characters are written as visible signs,
            bytes that are only part of a character as `<0xE2>`.
        starts_word: whether a space comes before it; False for what goes on inside a word, and for tokenizers that
            do not mark it.
        special: whether it is a special token such as `</s>`, or another that was added to the vocabulary.
    """

    text: str
    starts_word: bool
    special: bool


class VocabularyText:
    """Texts of single tokens, by id.

    Args:
        tokenizer: the LLM's tokenizer.
    """

    def __init__(self, tokenizer: Any):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.added_tokens_decoder)
        self._byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def __len__(self) -> int:
        """Words that the tokenizer knows, added ones among them."""
        return len(self._tokenizer)

    def __getitem__(self, token_id: int) -> TokenText:
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._special:
            return TokenText(raw, starts_word=False, special=True)
        text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if REPLACEMENT in text and REPLACEMENT not in raw:
            return TokenText(self._bytes(raw), starts_word=False, special=False)
        if not text.strip():  # nothing but white space, of which SentencePiece drops the first sign when it decodes
            text = raw.replace(_WORD_MARKS[0], " ") if _WORD_MARKS[0] in raw else text or raw
            return TokenText(_visible(text), starts_word=False, special=False)
        return TokenText(_visible(text.removeprefix(" ")), raw.startswith(_WORD_MARKS), special=False)

    def _bytes(self, raw: str) -> str:
        """SentencePiece writes a lone byte as `<0xE2>` itself; byte-level BPE has a character for each byte."""
        if re.fullmatch(r"<0x[0-9A-F]{2}>", raw) or not set(raw) <= set(self._byte_of):
            return raw
        return "".join(f"<0x{self._byte_of[character]:02X}>" for character in raw)


def _visible(text: str) -> str:
    return "".join(_VISIBLE.get(character) or _sign(character) for character in text)


def _sign(character: str) -> str:
    if character.isspace():
        return "␣"
    return character if character.isprintable() else f"<U+{ord(character):04X}>"
