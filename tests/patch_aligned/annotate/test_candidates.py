"""Candidates: their phrase at any threshold, and the way into a record and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer

from patch_aligned.annotate.regions import Candidate, mask_of_candidate

WORDS = [
    "person",
    "dog",
    "cat",
    "tennis",
    "racket",
    "shirt",
    "under",
    "##shirt",
    "woman",
    "##ab",
    "swab",
    "-",
    "'",
    ".",
]


def found(*tokens: tuple[str, float]) -> Candidate:
    return Candidate((0.0, 0.0, 5.0, 5.0), 0.9, "cat", 0.5, tokens)


@pytest.mark.parametrize(
    ("tokens", "phrase"),
    [
        ([("tennis", 0.5), ("racket", 0.6)], "tennis racket"),  # a whole tag
        ([("tennis", 0.1), ("racket", 0.6)], "racket"),  # a part of it
        ([("person", 0.3), ("woman", 0.4)], "person woman"),  # two tags at once
        ([("under", 0.3), ("##shirt", 0.4)], "undershirt"),  # pieces of a word
        ([("under", 0.1), ("##shirt", 0.4)], "shirt"),  # the end of one
        ([("woman", 0.3), ("sw", 0.1), ("##ab", 0.4)], "womanab"),  # glued as the tokenizer decodes it
        ([("t", 0.3), ("-", 0.4), ("shirt", 0.4)], "t - shirt"),
        ([("st", 0.3), (".", 0.4), ("bernard", 0.4)], "st. bernard"),
        ([("st", 0.1), (".", 0.4), ("bernard", 0.1)], ""),  # a mark names nothing
        ([("cat", 0.2)], ""),  # the threshold itself isn't above it
        ([], ""),
    ],
)
def test_the_phrase_has_the_tokens_above_the_threshold(tokens: list[tuple[str, float]], phrase: str) -> None:
    assert found(*tokens).phrase(0.2) == phrase


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8))
def test_word_pieces_are_glued_as_the_tokenizer_decodes_them(tiny_tokenizer: BertTokenizer, pieces: list[str]) -> None:
    if not any(map(str.isalnum, "".join(pieces))):
        return
    tokenizer_says = tiny_tokenizer.decode(tiny_tokenizer.convert_tokens_to_ids(["cat", *pieces]))
    assert found(("cat", 0.9), *((piece, 0.9) for piece in pieces)).phrase(0.2) == tokenizer_says


def test_a_candidate_comes_back_from_the_record_as_it_was() -> None:
    candidate = Candidate.rounded(
        [1 / 3, -0.00049, 1e3 + 1 / 7, 5], 0.1234567, "café", 2 / 3, [("cafe", 1 / 3), ("##s", 1.0)]
    )
    assert candidate.bbox_xyxy_px == (0.333, -0.0, 1000.143, 5.0)
    assert candidate.score == 0.123457
    record = json.loads(json.dumps(candidate.to_record()))
    assert Candidate.from_record(record, "candidates[0]") == candidate


def test_what_else_is_in_a_candidate_is_its_mask() -> None:
    entry = found().to_record()
    assert mask_of_candidate(entry) == {}
    assert mask_of_candidate(entry | {"rle_mask": "04", "area_px": 4}) == {"rle_mask": "04", "area_px": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"candidates\[3\]: field 'bbox\[3\]': found nothing"),
        ({"bbox": [1, 2, 3, float("nan")]}, r"'bbox\[3\]': found nan; input should be a finite number"),
        ({"score": "0.5"}, r"candidates\[3\]: field 'score': found '0.5'"),
        ({"score": 10**400}, r"candidates\[3\]: field 'score': found 1000"),
        ({"best_tag_score": True}, r"candidates\[3\]: field 'best_tag_score': found True"),
        ({"best_tag": " "}, r"candidates\[3\]: field 'best_tag': found ' '"),
        ({"tokens": [["cat"]]}, r"candidates\[3\]: field 'tokens\[0\]\[1\]': found nothing"),
    ],
)
def test_broken_candidates_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Candidate.from_record(found().to_record() | change, "candidates[3]")


def test_missing_keys_are_named() -> None:
    entry = found().to_record()
    del entry["tokens"]
    with pytest.raises(ValueError, match=r"candidates\[0\]: field 'tokens': found nothing; field required"):
        Candidate.from_record(entry, "candidates[0]")
    with pytest.raises(ValueError, match=r"candidates\[0\]: found None"):
        Candidate.from_record(None, "candidates[0]")
