"""Chat templates in Jinja give the ids that the conversation templates give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.convert.chat_template import chat_template
from llava.mm_utils import tokenizer_image_token

TOKENIZERS = ("tiny-vicuna", "tiny-tok-legacy", "tiny-tok-mpt")
TURNS = ["What is this?", "A cat.", "And its colour?\nIn one word.", "Black", "Thanks!"]
# A space at an edge is a text of its own kind: some templates trim it.
SPACED_TURNS = ["  What is this? ", " A cat. ", "And? "]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, golden_world: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(request.param)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


def expected_ids(mode: str, tokenizer: Any, turns: list[str], image: str, system: str | None = None) -> list[int]:
    dialogue = conv_templates[mode].copy()
    if system is not None:
        dialogue.system = system
    for position, text in enumerate(turns):
        dialogue.append_message(dialogue.roles[position % 2], image * (position == 0) + text)
    if len(turns) % 2:
        dialogue.append_message(dialogue.roles[1], None)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    ids = tokenizer_image_token(dialogue.get_prompt(), tokenizer)
    return [image_id if i == IMAGE_TOKEN_INDEX else i for i in ids]


def messages(turns: list[str], images: int) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    found: list[dict[str, Any]] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    parts = [{"type": "image"}] * images
    found[0]["content"] = [{"type": "text", "text": turns[0]}, *parts]
    return found


@pytest.mark.parametrize("mode", sorted(conv_templates))
def test_ids_equal_those_of_the_conversation_template(mode: str, tokenizer: Any) -> None:
    tokenizer.chat_template = chat_template(conv_templates[mode], tokenizer)
    image = "<Image><image></Image>\n" if "mmtag" in conv_templates[mode].version else "<image>\n"
    for turns in (TURNS[:1], TURNS[:2], TURNS[:3], TURNS[:4], TURNS, SPACED_TURNS):
        found = tokenizer.apply_chat_template(
            messages(turns, 1), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert found == expected_ids(mode, tokenizer, turns, image), turns


@pytest.mark.parametrize("images", [0, 2])
def test_any_number_of_images_stands_before_the_question(images: int, tokenizer: Any) -> None:
    tokenizer.chat_template = chat_template(conv_templates["v1"], tokenizer)
    found = tokenizer.apply_chat_template(
        messages(TURNS[:1], images), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert found == expected_ids("v1", tokenizer, TURNS[:1], "<image>\n" * images)


@pytest.mark.parametrize("mode", ["v1", "chatml_direct", "llava_llama_2", "llava_llama_3", "qwen_2", "qwen_3"])
def test_a_system_message_takes_the_place_of_the_templates_own(mode: str, tokenizer: Any) -> None:
    tokenizer.chat_template = chat_template(conv_templates[mode], tokenizer)
    dialogue = [{"role": "system", "content": "Be brief."}, *messages(TURNS[:3], 1)]
    found = tokenizer.apply_chat_template(dialogue, add_generation_prompt=True, tokenize=True, return_dict=False)
    roles = {"chatml_direct": "<|im_start|>system\n", "llava_llama_3": "<|start_header_id|>system<|end_header_id|>\n\n"}
    header = "<|im_start|>system\n" if "qwen" in mode else roles.get(mode, "")
    assert found == expected_ids(mode, tokenizer, TURNS[:3], "<image>\n", header + "Be brief.")


def test_marks_around_images_are_kept(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.chat_template = chat_template(conv_templates["v1"], tokenizer, has_start_and_end=True)
    found = tokenizer.apply_chat_template(
        messages(TURNS[:1], 1), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert found == expected_ids("v1", tokenizer, TURNS[:1], "<im_start><image><im_end>\n")


def test_turns_out_of_order_are_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = chat_template(conv_templates["v1"], tokenizer)
    with pytest.raises(Exception, match="must alternate"):
        tokenizer.apply_chat_template([{"role": "assistant", "content": "Hello"}], tokenize=False)
