"""Templates against the prompts that upstream makes, and what they mark as answers."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava import conversation
from llava.conversation import Conversation, SeparatorStyle, conv_templates, conversation_mode, template_named

LLAVA_NEXTS = ("llava_llama_3", "qwen_1_5", "qwen_2", "qwen_2_5", "qwen_3")
UPSTREAMS = [name for name in conv_templates if name not in LLAVA_NEXTS]
PLAIN_WITH_ANSWER = ("one_closed", "two_open", "three_closed", "spaces")


@pytest.fixture(scope="module")
def recorded(goldens: Path) -> dict[str, Any]:
    return json.loads((goldens / "g_conversation.json").read_text())


def dialogue(name: str, turns: list[list[Any]]) -> Conversation:
    filled = conv_templates[name].copy()
    filled.messages = []
    for who, text in turns:
        filled.append_message(filled.roles[who == "a"], text)
    return filled


@pytest.mark.golden
def test_templates_are_upstreams(recorded: dict[str, Any]) -> None:
    assert list(conv_templates)[: len(recorded["templates"])] == list(recorded["templates"])
    for name, expected in recorded["templates"].items():
        template = conv_templates[name]
        found = {field: getattr(template, field) for field in expected}
        found |= {"roles": list(template.roles), "messages": [list(m) for m in template.messages]}
        assert found | {"sep_style": template.sep_style.name} == expected, name
    styles = {style.name: style.value for style in SeparatorStyle}
    assert styles == recorded["SeparatorStyle"] | {"LLAMA_3": 6, "CHATML": 7}
    default = [name for name, template in conv_templates.items() if template is conversation.default_conversation]
    assert default == recorded["default_conversation_is"]


@pytest.mark.golden
@pytest.mark.parametrize("name", UPSTREAMS)
def test_prompts_are_upstreams(recorded: dict[str, Any], name: str) -> None:
    for key, expected in recorded["prompts"][name].items():
        pattern, _, system = key.partition("/")
        if pattern == "template_own_messages":
            filled = conv_templates[name].copy()
        elif pattern == "tuple_first":
            filled = dialogue(name, [["u", ("<image>\nTuple text", Image.new("RGB", (4, 4)), "Default")], ["a", None]])
        else:
            filled = dialogue(name, recorded["turns"][pattern])
        if system == "nosys":
            filled.system = ""
        if expected == {"error": "TypeError"}:
            # Difference: upstream cannot write an answer in a plain template, as its second separator is None.
            assert filled.sep_style is SeparatorStyle.PLAIN and pattern in PLAIN_WITH_ANSWER
            assert filled.get_prompt() == "".join(text + "\n" for _, text in filled.messages if text)
        else:
            assert filled.get_prompt() == expected, key


TEXTS = st.text(min_size=1).filter(str.strip)


@pytest.mark.parametrize("name", [name for name in conv_templates if "plain" not in name])
@given(question=TEXTS, answers=st.lists(TEXTS, min_size=1, max_size=3), last=TEXTS)
def test_an_answer_starts_where_the_open_prompt_ends(name: str, question: str, answers: list[str], last: str) -> None:
    turns = [turn for answer in answers for turn in (["u", question], ["a", answer])] + [["u", question]]
    opened = dialogue(name, [*turns, ["a", None]])
    closed = dialogue(name, [*turns, ["a", last]])
    segments = list(closed.segments())
    place = max(place for place, segment in enumerate(segments) if segment.supervised)
    assert "".join(segment.text for segment in segments[:place]) == opened.get_prompt()
    assert segments[place].text.endswith(closed.stop_string)
    assert (last.strip() if name in LLAVA_NEXTS else last) in segments[place].text
    assert [segment.supervised for segment in closed.segments()].count(True) == len(answers) + 1


# What the chat templates of Llama 3 Instruct, Qwen2.5 and Qwen3 (thinking left out) make of a dialogue, with a system
# text where the family has one; Llama's tokenizer puts `<|begin_of_text|>` first.
LLAMA_3 = (
    "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA boat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
QWEN_3 = (
    "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA boat.<|im_end|>\n"
    "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("name", "system", "prompt"),
    [
        ("llava_llama_3", "<|start_header_id|>system<|end_header_id|>\n\nBe brief.", LLAMA_3),
        ("qwen_2", None, f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{QWEN_3}"),
        ("qwen_3", None, QWEN_3),
        ("qwen_2_5", "", QWEN_3),
    ],
)
def test_prompts_are_those_of_the_llms_own_chat_templates(name: str, system: str | None, prompt: str) -> None:
    filled = dialogue(name, [["u", "<image>\nWhat? "], ["a", "\nA boat."], ["u", "Where?"], ["a", None]])
    if system is not None:
        filled.system = system
    assert filled.get_prompt() == prompt


@pytest.mark.parametrize(
    ("name", "config", "mode"),
    [
        ("llava-v1.5-7b", {"model_type": "llava_llama"}, "llava_v1"),
        ("llava-v1.5-llama-3.1-8b", {"model_type": "llava_llama"}, "llava_llama_3"),
        ("llama3-llava-next-8b", {"model_type": "llava_llama"}, "llava_llama_3"),
        ("llava-v1.6-34b", {}, "chatml_direct"),
        ("llava-llama-2-13b", {}, "llava_llama_2"),
        ("anything", {}, "llava_v0"),
        ("llava-v1.6-mistral-7b", {}, "mistral_instruct"),
        ("llava-v1.6-mistral-7b", {"model_type": "llava_mistral"}, "mistral_instruct"),
        ("my-run", {"model_type": "llava_mistral"}, "mistral_instruct"),
        ("my-run", {"model_type": "llava_llama"}, "llava_v0"),
        ("llava-v1.5-qwen2.5-7b", {"model_type": "llava_qwen"}, "qwen_2"),
        ("my-run", {"model_type": "llava_qwen3"}, "qwen_3"),
        ("my-run", {"model_type": "llava_qwen", "conversation_version": "v1"}, "v1"),
        ("llava-v1.5-7b", {"conversation_version": "chatml_direct"}, "chatml_direct"),
        ("llava-v1.5-7b-pretrain", {"tune_mm_mlp_adapter": True}, "plain"),
        ("llava-v1.5-7b-pretrain", {"tune_mm_mlp_adapter": True, "conversation_version": "v1"}, "v1"),
    ],
)
def test_a_checkpoint_is_talked_to_as_its_config_its_type_or_its_name_says(
    name: str, config: dict[str, str], mode: str
) -> None:
    assert conversation_mode(name, SimpleNamespace(**config)) == mode


def test_an_empty_answer_is_an_open_turn() -> None:
    assert not any(segment.supervised for segment in dialogue("v1", [["u", "q"], ["a", ""]]).segments())


def test_copies_do_not_share_messages() -> None:
    first = conv_templates["v1"].copy()
    first.append_message("USER", "q")
    assert list(conv_templates["v1"].messages) == []
    second = first.copy()
    second.append_message("ASSISTANT", "a")
    assert first.messages == [["USER", "q"]]


def test_llama_2_must_start_with_a_question() -> None:
    with pytest.raises(ValueError, match="starts with text of 'USER'"):
        dialogue("llama_2", [["a", "hello"]]).get_prompt()


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("Default", (80, 40), (80, 40)),
        ("Crop", (80, 40), (80, 40)),
        ("Pad", (80, 40), (80, 80)),
        ("Resize", (80, 40), (336, 336)),
        ("Default", (2000, 1000), (1344, 672)),  # longest side 1344
        ("Default", (1500, 1500), (672, 672)),  # shortest side 672 at most
        ("Default", (1000, 4000), (336, 1344)),
    ],
)
def test_images_are_shaped_for_display(mode: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (9, 9, 9))
    shaped = conv_templates["v1"].process_image(image, mode, return_pil=True)
    assert shaped.size == expected
    if mode == "Pad":
        assert shaped.getpixel((0, 0)) == (122, 116, 104) and shaped.getpixel((40, 40)) == (9, 9, 9)


def test_images_travel_as_base64_png() -> None:
    filled = dialogue("v1", [["u", ("<image>\nWhat?", Image.new("RGB", (5, 3), (1, 2, 3)), "Default")], ["a", None]])
    (encoded,) = filled.get_images()
    decoded = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert (decoded.format, decoded.size, decoded.getpixel((0, 0))) == ("PNG", (5, 3), (1, 2, 3))
    assert filled.get_images(return_pil=True)[0].size == (5, 3)


def test_chat_window_and_dict_show_the_dialogue() -> None:
    image = Image.new("RGB", (5, 3))
    filled = dialogue("v1", [["u", ("<image>\nWhat?", image, "Default")], ["a", "That."], ["u", "Why?"], ["a", None]])
    first, second = filled.to_gradio_chatbot()
    assert first[0].startswith('<img src="data:image/jpeg;base64,') and first[0].endswith("What?")
    assert first[1] == "That." and second == ["Why?", None]
    assert json.loads(json.dumps(filled.dict()))["messages"][0] == ["USER", "<image>\nWhat?"]


def test_a_template_is_found_by_its_name_or_the_nearest_is_named() -> None:
    assert template_named("llava_v1") is conv_templates["llava_v1"]
    with pytest.raises(ValueError, match=r"--conv-mode vicuna: no such template; did you mean vicuna_v1\? There are"):
        template_named("vicuna")


def test_unknown_image_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="image_process_mode: found 'Stretch', expected Pad"):
        conv_templates["v1"].process_image(Image.new("RGB", (4, 4)), "Stretch")
