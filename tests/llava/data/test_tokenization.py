"""Ids and labels against upstream's, where upstream's are right, and by name where they are not."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava import conversation
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Segment, conv_templates
from llava.data.tokenization import (
    preprocess,
    preprocess_llama_2,
    preprocess_mpt,
    preprocess_multimodal,
    preprocess_plain,
    preprocess_v1,
    tokenize_segments,
    training_segments,
)
from llava.mm_utils import tokenizer_image_token

RECORDED_KEYS = [
    *(f"{t}/{k}/2048" for t in ("v1", "llava_v1", "v1_mmtag", "v0", "v0_mmtag", "plain") for k in ("vicuna", "legacy")),
    *(f"{t}/{k}/2048" for t in ("llama_2", "llava_llama_2", "mistral_instruct") for k in ("vicuna", "legacy")),
    *(f"{t}/{k}/2048" for t in ("mpt", "chatml_direct") for k in ("vicuna", "legacy", "mpt")),
    "v1/vicuna/60",
    "v1/legacy/60",
    "v1/vicuna/2048/start_end",
]

# What upstream labels wrongly, and what each dialogue's labels decode to here instead.
CHATML_ANSWERS = {
    "c0": ["A small red boat on a calm lake.<|im_end|>"],
    "c1": ["Two people walk along a narrow street.<|im_end|>"],
    "c2": ["Red, green and blue.<|im_end|>"],
    "c3": ["There are four birds.<|im_end|>", "They are sitting on a wire.<|im_end|>", "No.<|im_end|>"],
    "c4": ["Hello, how can I help you today?<|im_end|>", "12 + 7 = 19.<|im_end|>"],
    "c5": ["Yes.<|im_end|>"],
    "c6": ["It says:\n日本  café 😀<|im_end|>"],
    "c7": ["USER: hi ASSISTANT: hello<|im_end|>"],
    "c8": ["Fine<|im_end|>"],
    "c9": [" ".join(str(number) for number in range(1, 101)) + "<|im_end|>"],
}


def v0_answers(dialogue: dict[str, Any]) -> list[str]:
    answers = [turn["value"] for turn in dialogue["conversations"] if turn["from"] == "gpt"]
    return [f"{answer}\n###" for answer in answers if answer]


def differences(template: str, dialogue: dict[str, Any]) -> list[str] | None:
    """Answers that are labelled here, where upstream's labels are wrong; None where they are right."""
    if template in ("mpt", "chatml_direct"):
        return CHATML_ANSWERS[dialogue["id"]]  # upstream miscounts one <|im_end|> a turn and drops all labels
    if template in ("v0", "v0_mmtag"):
        return v0_answers(dialogue)  # upstream's labels drift over roles and questions
    if template in ("v1", "llava_v1", "v1_mmtag") and dialogue["id"] == "c7":
        return ["USER: hi ASSISTANT: hello</s>"]  # upstream splits at "ASSISTANT: ", miscounts, drops all labels
    if dialogue["id"] == "c8":
        closing = "</s>" if "v1" in template else " </s>"
        return [f"Fine{closing}"]  # upstream miscounts the empty answer and drops the labels of the other
    return None


def labelled_runs(labels: list[int]) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def encode(dialogue: dict[str, Any], template: str, tokenizer: Any, start_end: bool = False) -> dict[str, list[int]]:
    chosen = conv_templates[template]
    sources = [dialogue["conversations"]]
    if "image" in dialogue:
        args = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=start_end)
        sources = preprocess_multimodal(sources, args, chosen)
    encoded = preprocess(sources, tokenizer, "image" in dialogue, chosen)
    return {name: tensor[0].tolist() for name, tensor in encoded.items()}


@pytest.fixture(scope="module")
def recorded(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "g_preprocess.json").read_text())


@pytest.mark.golden
@pytest.mark.parametrize("key", RECORDED_KEYS)
def test_ids_and_labels_are_upstreams_or_differ_by_name(
    key: str, recorded: dict[str, Any], tokenizers: dict[str, Any], conversations: list[Any], goldens: Path
) -> None:
    template, tokenizer_name, max_length, *start_end = key.split("/")
    tokenizer = copy.deepcopy(tokenizers[tokenizer_name])
    tokenizer.model_max_length = int(max_length)
    dialogues = conversations
    if template == "plain":
        dialogues = [*json.loads((goldens / "data_plain.json").read_text()), conversations[0], conversations[3]]
    if start_end:
        dialogues = [dialogue for dialogue in conversations if "image" in dialogue]
    for dialogue, expected in zip(dialogues, recorded[key], strict=True):
        if "error" in expected:
            with pytest.raises(ValueError, match="expected two for a plain template"):
                encode(dialogue, template, tokenizer)
            continue
        found = encode(dialogue, template, tokenizer, bool(start_end))
        assert found["input_ids"] == expected["input_ids"], dialogue["id"]
        answers = differences(template, dialogue)
        if answers is None:
            assert expected["warning"] is None
            assert found["labels"] == expected["labels"], dialogue["id"]
        else:
            assert found["labels"] != expected["labels"], f"{dialogue['id']} no longer differs: take it off the list"
            decoded = [tokenizer.decode(run) for run in labelled_runs(found["labels"])]
            # SentencePiece tokenizers drop the space before the first word when decoding.
            assert [text.removeprefix(" ") for text in decoded] == answers


def test_no_recorded_set_is_left_out(recorded: dict[str, Any]) -> None:
    assert {*RECORDED_KEYS, "v1/vicuna/2048/batch_c2_c4"} == set(recorded)


@pytest.mark.golden
def test_a_batch_is_padded_on_the_right(recorded: dict[str, Any], tokenizer: Any, conversations: list[Any]) -> None:
    sources = [conversations[number]["conversations"] for number in (2, 4)]
    encoded = preprocess(sources, tokenizer, has_image=False, conversation=conv_templates["v1"])
    assert {name: rows.tolist() for name, rows in encoded.items()} == recorded["v1/vicuna/2048/batch_c2_c4"]


@pytest.mark.golden
def test_images_are_placed_as_upstream_places_them(recorded: dict[str, Any], conversations: list[Any]) -> None:
    for key, flag in (("v1/vicuna/2048", False), ("v1_mmtag/vicuna/2048", False)):
        args = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=flag)
        for dialogue, expected in zip(conversations, recorded[key], strict=True):
            if "image" in dialogue:
                before = copy.deepcopy(dialogue)
                (found,) = preprocess_multimodal([dialogue["conversations"]], args, conv_templates[key.split("/")[0]])
                assert [turn["value"] for turn in found] == expected["after_preprocess_multimodal"]
                assert dialogue == before


def test_several_images_of_a_message_keep_their_places(tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "First <image> then <image>."}, {"from": "gpt", "value": "Yes."}]
    found = encode({"image": ["a", "b"], "conversations": turns}, "v1", tokenizer)
    assert found["input_ids"].count(IMAGE_TOKEN_INDEX) == 2  # upstream: one
    plain = encode({"image": ["a", "b"], "conversations": turns}, "plain", tokenizer)
    assert plain["input_ids"][:3] == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX]


def test_an_empty_caption_is_not_learnt(tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": ""}]
    assert set(encode({"image": "a", "conversations": turns}, "plain", tokenizer)["labels"]) == {IGNORE_INDEX}


def test_the_place_of_an_image_is_never_a_label(tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "Show it."}, {"from": "gpt", "value": "Here: <image>"}]
    found = encode({"image": "a", "conversations": turns}, "v1", tokenizer)
    assert IMAGE_TOKEN_INDEX in found["input_ids"] and IMAGE_TOKEN_INDEX not in found["labels"]


def test_without_a_template_the_default_of_the_moment_is_taken(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]]
    monkeypatch.setattr(conversation, "default_conversation", conv_templates["llava_llama_2"])
    expected = preprocess(turns, tokenizer, conversation=conv_templates["llava_llama_2"])["input_ids"].tolist()
    assert preprocess(turns, tokenizer)["input_ids"].tolist() == expected
    assert preprocess_llama_2(turns, tokenizer)["input_ids"].tolist() == expected
    with pytest.raises(ValueError, match="template of style LLAMA_2, expected TWO"):
        preprocess_v1(turns, tokenizer)


def test_upstreams_names_serve_their_styles(tokenizer: Any) -> None:
    turns = [[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Hello"}]]
    for function, name in ((preprocess_v1, "v1"), (preprocess_mpt, "mpt"), (preprocess_llama_2, "llama_2")):
        template = conv_templates[name]
        found = function(turns, tokenizer, has_image=True, conversation=template)
        assert found["labels"].tolist() == preprocess(turns, tokenizer, True, template)["labels"].tolist()
    plain = preprocess_plain(turns, tokenizer, conversation=conv_templates["plain"])
    assert plain["input_ids"][0, 1] == IMAGE_TOKEN_INDEX


DIALOGUES = st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=3)
TEMPLATES = ("v1", "llava_llama_2", "mistral_instruct", "chatml_direct", "mpt", "llava_v0")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["vicuna", "legacy", "mpt"])
@given(turns=DIALOGUES)
@settings(max_examples=25)
def test_ids_are_those_of_the_prompt(
    tokenizers: dict[str, Any], name: str, template: str, turns: list[tuple[str, str]]
) -> None:
    """One tokenisation of the whole prompt: what the model is trained on is what `tokenizer_image_token` gives it."""
    dialogue = [
        {"from": who, "value": text}
        for question, answer in turns
        for who, text in (("human", f"<image>{question}"), ("gpt", answer))
    ]
    segments = list(training_segments(dialogue, conv_templates[template]))
    ids, labels = tokenize_segments(segments, tokenizers[name], has_image=True)
    assert ids == tokenizer_image_token("".join(segment.text for segment in segments), tokenizers[name])
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids, strict=True))


@pytest.mark.parametrize("question", ["What?", "ends with a space ", "日本", "assistant\n"])
@given(
    answers=st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1), min_size=1)
)
def test_labels_decode_to_the_answers(tokenizers: dict[str, Any], question: str, answers: list[str]) -> None:
    """ChatML with a byte-level tokenizer, whose decoding is exact. A line break would merge with the template's own."""
    tokenizer = tokenizers["mpt"]
    dialogue = [
        {"from": who, "value": text} for answer in answers for who, text in (("human", question), ("gpt", answer))
    ]
    segments = training_segments(dialogue, conv_templates["chatml_direct"])
    _, labels = tokenize_segments(segments, tokenizer, has_image=False)
    decoded = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in labelled_runs(labels)]
    assert decoded == [f"{answer}<|im_end|>" for answer in answers]


# Words that both vocabularies hold, so that tokens have several characters and straddle the cuts below.
WORDS = st.lists(st.sampled_from(["boat", " boat", " people", "assistant", " ", "\n", "日", "</s>", "é"]), min_size=1)


@given(words=WORDS, cuts=st.lists(st.integers(1, 30), max_size=5), first_supervised=st.booleans())
def test_a_token_is_labelled_exactly_if_it_touches_an_answer(
    tokenizers: dict[str, Any], words: list[str], cuts: list[int], first_supervised: bool
) -> None:
    """By brute force over characters, for SentencePiece and byte-level alike."""
    text = "".join(words)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    segments = [
        Segment(text[start:end], bool(number % 2) != first_supervised)
        for number, (start, end) in enumerate(pairwise(edges))
    ]
    in_answer = [segment.supervised for segment in segments for _ in segment.text]
    for name in ("vicuna", "mpt"):
        tokenizer = tokenizers[name]
        ids, labels = tokenize_segments(segments, tokenizer, has_image=False)
        # The space that SentencePiece puts first belongs to what follows it.
        padded = f" {text}" if name == "vicuna" and text.startswith(" ") else text
        characters = [*in_answer[:1], *in_answer] if padded != text else in_answer
        encoded = tokenizer(padded, return_offsets_mapping=True)
        assert encoded.input_ids == ids
        for token, (first, end), label in zip(ids, encoded.offset_mapping, labels, strict=True):
            assert label == (token if any(characters[first:end]) else IGNORE_INDEX)


def test_the_first_word_after_an_image_is_learnt_with_its_space(tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " people"}]
    found = encode({"image": "a", "conversations": turns}, "plain", tokenizer)
    space, word, line_break = (tokenizer.convert_tokens_to_ids(token) for token in ("▁", "▁people", "<0x0A>"))
    assert found["input_ids"] == [tokenizer.bos_token_id, IMAGE_TOKEN_INDEX, space, word, line_break]
    assert found["labels"] == [IGNORE_INDEX, IGNORE_INDEX, space, word, line_break]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([("human", "a"), ("human", "b")], "expected 'human' and 'gpt' in turn"),
        ([("gpt", "a")], "expected 'human' and 'gpt' in turn"),
        ([("human", "a"), ("bot", "b")], "field from: found 'bot'"),
    ],
)
def test_turns_that_do_not_fit_are_refused(tokenizer: Any, turns: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocess(
            [[{"from": who, "value": text} for who, text in turns]], tokenizer, conversation=conv_templates["v1"]
        )


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(ValueError, match="it gives no offsets"):
        tokenize_segments([Segment("a")], SimpleNamespace(is_fast=False), has_image=False)


def test_rows_cannot_be_padded_without_a_padding_token(tokenizer: Any) -> None:
    tokenizer.pad_token = None
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "b"}] for text in ("a", "a longer one")]
    with pytest.raises(ValueError, match="pad_token_id is None"):
        preprocess(turns, tokenizer, conversation=conv_templates["v1"])
