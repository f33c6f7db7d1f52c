"""Labels by round trip: what they decode to is the answers with their end marks, for each template and kind of
vocabulary that go together."""

from __future__ import annotations

import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.data.tokenization import tokenize_segments, training_segments
from llava.mm_utils import tokenizer_image_token

# How Llama 3 and Qwen cut text before merging bytes: line breaks go with the blanks before them.
WORDS_OF_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLE_TEXT = [
    "system\n\nYou are a helpful assistant.\n\nuser\n\nWhat is this?\n\n\nA boat  on the lake.\n \n12 + 7 = 19.\n",
    "assistant\nThe red boat, and the people; user\nIt says: café, 日本, 😀!\n\n\n\n  ok ok",
] * 50
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level(specials: tuple[str, ...], *, bos: bool, trim_offsets: bool = False) -> Any:
    """A byte-level BPE of some merges; with `bos`, its post-processor puts the first special token in front."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(WORDS_OF_LLAMA_3), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if not bos:
        tokenizer.normalizer = normalizers.NFC()  # as Qwen's
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE_TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    after: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        first = (specials[0], tokenizer.token_to_id(specials[0]))
        after.append(processors.TemplateProcessing(f"{specials[0]} $A", special_tokens=[first]))
    tokenizer.post_processor = processors.Sequence(after)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0] if bos else None)


@pytest.fixture(scope="module")
def vocabularies(goldens: Path) -> dict[str, Any]:
    return {
        "llama_3": byte_level(HEADERS, bos=True),
        "llama_3, trimmed offsets": byte_level(HEADERS, bos=True, trim_offsets=True),
        "qwen": byte_level(CHATML, bos=False),
        "qwen, trimmed offsets": byte_level(CHATML, bos=False, trim_offsets=True),
        "vicuna": AutoTokenizer.from_pretrained(goldens / "tiny-vicuna"),
        "vicuna, legacy": AutoTokenizer.from_pretrained(goldens / "tiny-tok-legacy"),
    }


SENTENCE_PIECE = [
    (template, vocabulary)
    for template in ("v1", "llava_v1", "v1_mmtag", "llama_2", "llava_llama_2", "mistral_instruct", "v0")
    for vocabulary in ("vicuna", "vicuna, legacy")
]
BYTE_LEVEL = [
    *(("llava_llama_3", vocabulary) for vocabulary in ("llama_3", "llama_3, trimmed offsets")),
    *(
        (template, vocabulary)
        for template in ("qwen_1_5", "qwen_2", "qwen_2_5", "qwen_3", "chatml_direct", "mpt")
        for vocabulary in ("qwen", "qwen, trimmed offsets")
    ),
]

# Among random characters, those that are easily merged with a template's own or cut up.
# Hypothesis also draws the constants of a module, and <image> in a question would be a second image.
TEXT = st.text(st.one_of(st.sampled_from(" \n\t:boatuser日é😀"), st.characters(exclude_categories=["Cs"]))).filter(
    lambda text: "<image>" not in text
)
ANSWER = TEXT.filter(str.strip)


def supervised_runs(template: str, tokenizer: Any, question: str, answers: list[str]) -> list[list[int]]:
    """Ids of each uninterrupted run of labels, of a dialogue about an image."""
    turns = [(("human", question), ("gpt", answer)) for answer in answers]
    dialogue = [{"from": who, "value": text} for pair in turns for who, text in pair]
    dialogue[0]["value"] = f"<image>\n{question}"
    segments = list(training_segments(dialogue, conv_templates[template]))
    ids, labels = tokenize_segments(segments, tokenizer, has_image=True)
    assert ids == tokenizer_image_token("".join(segment.text for segment in segments), tokenizer)
    assert ids.count(IMAGE_TOKEN_INDEX) == 1
    edges = [0, *(at for at in range(1, len(labels)) if (labels[at] < 0) != (labels[at - 1] < 0)), len(labels)]
    return [labels[start:end] for start, end in pairwise(edges) if labels[start] != IGNORE_INDEX]


@pytest.mark.parametrize(("template", "vocabulary"), BYTE_LEVEL)
@given(question=TEXT, answers=st.lists(ANSWER, min_size=1, max_size=3))
@settings(max_examples=40)
def test_byte_level_labels_decode_to_the_answers_exactly(
    vocabularies: dict[str, Any], template: str, vocabulary: str, question: str, answers: list[str]
) -> None:
    tokenizer = vocabularies[vocabulary]
    trimmed = [answer.strip() for answer in answers]
    # Upstream's templates do not trim: a line break at an answer's start would be one token with the header's.
    upstreams = template in ("chatml_direct", "mpt")
    runs = supervised_runs(template, tokenizer, question, trimmed if upstreams else answers)
    decoded = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
    mark = conv_templates[template].stop_string
    normal = unicodedata.normalize if tokenizer.bos_token is None else lambda _, text: text
    assert decoded == [normal("NFC", answer) + mark for answer in trimmed]


@pytest.mark.parametrize(("template", "vocabulary"), SENTENCE_PIECE)
@given(question=ANSWER, answers=st.lists(ANSWER, min_size=1, max_size=3))
@example(question="What is it?", answers=["a▁b", "▁"])
@settings(max_examples=25)
def test_sentence_piece_labels_decode_to_the_answers_exactly(
    vocabularies: dict[str, Any], template: str, vocabulary: str, question: str, answers: list[str]
) -> None:
    tokenizer = vocabularies[vocabulary]
    closing = {"v0": "\n###"}.get(template, " </s>" if "v1" not in template else "</s>")
    runs = supervised_runs(template, tokenizer, question, answers)
    # Decoding loses spaces at the start; that the first one is labelled is tested in test_tokenization.py.
    # SentencePiece writes spaces as ▁, so one of the text comes back as a space.
    decoded = [tokenizer.decode(run, clean_up_tokenization_spaces=False).lstrip(" ") for run in runs]
    assert decoded == [f"{answer}{closing}".replace("▁", " ").lstrip(" ") for answer in answers]


def test_llama_3_starts_once_and_learns_its_end_mark(vocabularies: dict[str, Any]) -> None:
    tokenizer = vocabularies["llama_3"]
    dialogue = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "\n A boat. "}]
    ids, labels = tokenize_segments(training_segments(dialogue, conv_templates["llava_llama_3"]), tokenizer, False)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert labels[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    header = tokenizer("<|end_header_id|>\n\n", add_special_tokens=False).input_ids
    start = next(at for at, label in enumerate(labels) if label != IGNORE_INDEX)
    assert ids[start - len(header) : start] == header  # what a prompt ends with, token by token
