"""Prompts: within the model's tokens, cut between tags, every token mapped to its tag."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer

from patch_aligned.annotate.regions import NO_TAG, PromptBuilder


def tag_tokens(tokenizer: BertTokenizer, tag: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(tag.lower(), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("join", "text"), [(", ", "person, tennis racket, cat."), (". ", "person. tennis racket. cat.")]
)
def test_a_prompt_is_lower_cased_and_ends_with_a_period(tiny_tokenizer: BertTokenizer, join: Any, text: str) -> None:
    (prompt,) = PromptBuilder(tiny_tokenizer, join=join).build(["Person", " tennis racket ", "cat"])
    assert prompt.text == text
    assert list(prompt.input_ids) == tiny_tokenizer(text)["input_ids"]
    assert prompt.pieces[1] == "person" and prompt.pieces[-2] == "."
    assert prompt.tag_of_token == (NO_TAG, 0, NO_TAG, 1, 1, NO_TAG, 2, NO_TAG, NO_TAG)


def test_punctuation_within_a_tag_belongs_to_it(tiny_tokenizer: BertTokenizer) -> None:
    (prompt,) = PromptBuilder(tiny_tokenizer, join=". ").build(["t-shirt", "a. cat"])
    owned = [[p for p, tag in zip(prompt.pieces, prompt.tag_of_token, strict=True) if tag == own] for own in (0, 1)]
    assert owned == [["t", "-", "shirt"], ["a", ".", "cat"]]


def test_words_that_the_vocabulary_lacks_keep_their_letters(tiny_tokenizer: BertTokenizer) -> None:
    (prompt,) = PromptBuilder(tiny_tokenizer).build(["cat", "日 dog"])
    assert prompt.pieces == ("[CLS]", "cat", ",", "日", "dog", ".", "[SEP]")
    assert prompt.input_ids[3] == tiny_tokenizer.unk_token_id


def test_a_tag_stands_in_the_prompts_once_whatever_its_case(tiny_tokenizer: BertTokenizer) -> None:
    (prompt,) = PromptBuilder(tiny_tokenizer).build(["Dog", "cat", " dog", "CAT"])
    assert prompt.text == "dog, cat."
    assert prompt.tags == ("Dog", "cat")


def test_no_tags_make_no_prompt(tiny_tokenizer: BertTokenizer) -> None:
    assert PromptBuilder(tiny_tokenizer).build([]) == []


@given(
    tags=st.lists(st.text("abc d-.,?", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=30),
    join=st.sampled_from([", ", ". "]),
)
def test_prompts_fit_and_hold_each_tag_whole_and_in_order(tiny_tokenizer: BertTokenizer, tags: Any, join: Any) -> None:
    limit = 20
    prompts = PromptBuilder(tiny_tokenizer, join=join, max_tokens=limit).build(tags)
    unique = list(dict.fromkeys(tag.strip() for tag in tags))
    assert [tag.strip() for prompt in prompts for tag in prompt.tags] == unique
    for prompt, following in zip(prompts, [*prompts[1:], None], strict=True):
        assert len(prompt.input_ids) <= limit
        assert prompt.input_ids[-2:] == (1012, 102)
        for position, tag in enumerate(prompt.tags):
            owned = [p for p, own in zip(prompt.pieces, prompt.tag_of_token, strict=True) if own == position]
            assert owned == tag_tokens(tiny_tokenizer, tag)
        if following:  # the next tag didn't fit
            assert len(prompt.input_ids) + 1 + len(tag_tokens(tiny_tokenizer, following.tags[0])) > limit


def test_256_tokens_make_one_prompt_and_one_more_makes_two(tiny_tokenizer: BertTokenizer) -> None:
    builder = PromptBuilder(tiny_tokenizer)
    tags = [" ".join("abcdefghi"), *("a" * length for length in range(1, 21))]  # 9 + 210 tokens, and 20 commas
    full = [*tags, "b " * 13]
    assert [len(prompt.input_ids) for prompt in builder.build(full)] == [256]
    assert [prompt.tags for prompt in builder.build([*full, "c"])] == [tuple(full), ("c",)]


def test_tags_that_make_no_prompt_are_refused(tiny_tokenizer: BertTokenizer) -> None:
    builder = PromptBuilder(tiny_tokenizer)
    with pytest.raises(ValueError, match="tag '': found 0 tokens, expected 1 to 253"):
        builder.build(["cat", "  "])
    with pytest.raises(ValueError, match=r"tag 'a a .*': found 254 tokens, expected 1 to 253"):
        builder.build(["a " * 254])
    assert len(builder.build(["a " * 253])[0].input_ids) == 256


def test_another_tokenizer_than_the_models_is_refused() -> None:
    # What transformers 5 makes of BertTokenizer(vocab_file=...): five tokens.
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})
    with pytest.raises(ValueError, match=r"found the ids \{'\[CLS\]': 2, .*expected \{'\[CLS\]': 101, "):
        PromptBuilder(tokenizer)
