"""Tokenise labels as inside a sentence, and average their word embeddings (Eq. 2).

Letters: R regions of the batch, K tokens of the longest label, D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_PROBE_WORDS = ("water", "tree", "table")
_CACHED_LABELS = 1 << 16


class LabelTokenizer:
    """Tokenises a label as inside a sentence, without BOS or EOS.

    SentencePiece tokenizers mark word starts themselves and take the plain word. Byte-level BPE marks a word inside a
    sentence by its leading space. The kind is detected by splitting a short sentence.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._leading = _leading_text(tokenizer)
        self._cache: dict[str, tuple[int, ...]] = {}

    def __call__(self, label: str) -> tuple[int, ...]:
        """Return the ids of one label.

        Raises:
            ValueError: if the label has no token.
        """
        ids = self._cache.get(label)
        if ids is None:
            ids = tuple(_encode(self._tokenizer, self._leading + " ".join(label.split()))) if label.strip() else ()
            if not ids:
                raise ValueError(
                    f"label {label!r}: found no token, expected at least one; correct the 'tag' in the PAD file"
                )
            if len(self._cache) >= _CACHED_LABELS:
                self._cache.clear()
            self._cache[label] = ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text."""
        return self._tokenizer.decode(list(ids)).strip()


def pad_label_ids(labels: Sequence[Sequence[int] | Tensor]) -> tuple[Tensor, Tensor]:
    """Pad the ids of each label with 0: returns ids `[R, K]` and their lengths `[R]`."""
    lengths = torch.tensor([len(ids) for ids in labels], dtype=torch.int64)
    padded = torch.zeros(len(labels), int(lengths.max()) if len(labels) else 0, dtype=torch.int64)
    for row, ids in enumerate(labels):
        padded[row, : len(ids)] = torch.as_tensor(ids)
    return padded, lengths


@torch.no_grad()
def label_embeddings(ids: Tensor, lengths: Tensor, embed_words: Callable[[Tensor], Tensor]) -> Tensor:
    """Average the word embeddings of each label's tokens (Eq. 2). No gradient reaches the table.

    Calls `embed_words` exactly once, even if R is 0: under ZeRO-3 all ranks gather the table together.

    Args:
        ids: `[R, K]`, padded with any valid id.
        lengths: `[R]`, number of tokens of each label, at least 1.
        embed_words: ids `[...]` -> `[..., D]`.

    Returns:
        `[R, D]`, float32 (float64 for a float64 table).
    """
    regions = ids.shape[0]
    if ids.numel() == 0:
        ids = ids.new_zeros(1, 1)
        lengths = lengths.new_ones(1)
    words = embed_words(ids)  # [R, K] -> [R, K, D]
    words = words.to(torch.promote_types(words.dtype, torch.float32))
    is_token = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # [R, K]
    return ((words * is_token[..., None]).sum(dim=1) / lengths[:, None])[:regions]  # [R, K, D] -> [R, D]


def _leading_text(tokenizer: Any) -> str:
    """Return the prefix with which a word alone is tokenised as inside a sentence: "" or a space."""
    for leading in ("", " "):
        if all(_splits_as_in_sentence(tokenizer, leading, word) for word in _PROBE_WORDS):
            return leading
    raise ValueError(
        f"{type(tokenizer).__name__}: found that a word inside a sentence is split neither like the word alone "
        "nor like the word behind a space; expected a SentencePiece, WordPiece or byte-level BPE tokenizer"
    )


def _splits_as_in_sentence(tokenizer: Any, leading: str, word: str) -> bool:
    return _encode(tokenizer, f"a {word}") == _encode(tokenizer, "a") + _encode(tokenizer, leading + word)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
