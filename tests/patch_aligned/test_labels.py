"""Labels as token ids and as embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from patch_aligned import labels
from patch_aligned.labels import LabelTokenizer, label_embeddings, pad_label_ids


class CountingTokenizer:
    """Characters as ids, plain like SentencePiece; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        self.calls += 1
        ids = [ord(letter) for word in text.split() for letter in f"_{word}"]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


@pytest.mark.golden
@pytest.mark.parametrize("name", ["tiny-vicuna", "tiny-tok-legacy", "tiny-tok-mpt"])
@pytest.mark.parametrize("label", ["water", "traffic light", "t-shirt", "é"])
def test_ids_are_those_that_the_label_has_inside_a_sentence(goldens: Path, name: str, label: str):
    tokenizer = AutoTokenizer.from_pretrained(goldens / name)
    sentence = tokenizer(f"a photo of {label}", add_special_tokens=False)["input_ids"]
    before = tokenizer("a photo of", add_special_tokens=False)["input_ids"]
    ids = LabelTokenizer(tokenizer)(label)
    assert list(ids) == sentence[len(before) :]
    assert not set(ids) & {tokenizer.bos_token_id, tokenizer.eos_token_id}


def test_whitespace_around_and_within_a_label_is_evened_out():
    tokenize = LabelTokenizer(CountingTokenizer())
    assert tokenize("  traffic \n light ") == tokenize("traffic light")


def test_a_label_is_tokenised_once_and_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(labels, "_CACHED_LABELS", 3)
    tokenizer = CountingTokenizer()
    tokenize = LabelTokenizer(tokenizer)
    before = tokenizer.calls
    for _ in range(5):
        tokenize("dog")
    assert tokenizer.calls == before + 1
    for word in ("cat", "bird", "fish", "cow", "hen"):
        tokenize(word)
    assert len(tokenize._cache) <= 3
    assert tokenize("dog") == tuple(map(ord, "_dog"))


def test_a_label_without_tokens_is_refused():
    with pytest.raises(ValueError, match="label ' ': found no token"):
        LabelTokenizer(CountingTokenizer())(" ")


def test_a_tokenizer_that_is_of_no_known_kind_is_refused():
    def backwards(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in reversed(text)]}

    with pytest.raises(ValueError, match="inside a sentence"):
        LabelTokenizer(backwards)


def test_embeddings_are_means_over_each_label_s_own_tokens():
    table = torch.nn.Embedding(50, 7, dtype=torch.float64)
    ids = [(3, 4, 5), (6,), (7, 7)]
    expected = torch.stack([table.weight[list(label)].mean(dim=0) for label in ids])
    found = label_embeddings(*pad_label_ids(ids), table)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert not found.requires_grad


def test_a_bfloat16_table_is_averaged_in_float32():
    table = torch.nn.Embedding(50, 7, dtype=torch.bfloat16)
    found = label_embeddings(*pad_label_ids([(3, 4, 5)]), table)
    torch.testing.assert_close(found[0], table.weight[3:6].detach().float().mean(dim=0))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("ids", [[], [(1, 2), (3,)]])
def test_the_table_is_asked_once_with_and_without_labels(ids: list[tuple[int, ...]]):
    table, asked = torch.nn.Embedding(50, 7), []

    def embed_words(wanted: torch.Tensor) -> torch.Tensor:
        asked.append(wanted.numel())
        return table(wanted)

    assert label_embeddings(*pad_label_ids(ids), embed_words).shape == (len(ids), 7)
    assert len(asked) == 1 and asked[0] > 0
