"""Chatting in the terminal, on the tiny checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from llava.conversation import conv_templates
from llava.eval.vqa_cli import load_model
from llava.model import builder
from llava.serve.cli import ImageChat, argument_parser, load_image, main, speaker_name


def arguments(*extra: str) -> list[str]:
    return ["--model-path", "tiny-llava", "--image-file", "images/im1.png", "--device", "cpu", *extra]


def test_a_chat_streams_each_answer_and_ends_at_an_empty_line(
    golden_world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["What is this?", "And this?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main(argument_parser().parse_args(arguments("--temperature", "0", "--max-new-tokens", "4", "--conv-mode", "v1")))
    printed = capsys.readouterr().out
    assert printed.count("ASSISTANT: ") == 2
    assert printed.rstrip().endswith("exit...")


def test_an_image_mark_that_is_typed_is_explained(
    golden_world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["<image> What is this?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    main(argument_parser().parse_args(arguments()))
    assert "without <image>" in capsys.readouterr().out


def test_the_image_comes_with_the_first_message_alone(golden_world: Path) -> None:
    tokenizer, model, processor, _ = builder.load_pretrained_model("tiny-llava", None, "tiny-llava", device="cpu")
    session = ImageChat(tokenizer, model, processor, load_image("images/im1.png"), conv_templates["v1"])
    first = session.prompt("What is this?")
    answer = session.answer(first, temperature=0, max_new_tokens=4)
    second = session.prompt("And this?")
    assert first.endswith("USER: <image>\nWhat is this? ASSISTANT:")
    assert second.count("<image>") == 1
    assert f"{answer}</s>USER: And this? ASSISTANT:" in second
    assert not conv_templates["v1"].messages


def test_another_image_and_a_reset_start_the_conversation_again(
    golden_world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["What?", "/image no.png", "/images", "And?", "/image images/im0.png", "What?", "/reset", "What?"]
    lines, prompts = iter([*asked, ""]), []
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    pixels: list[torch.Tensor] = []

    def answer(self: ImageChat, prompt: str, **kwargs: object) -> None:
        prompts.append(prompt.count("What?"))
        pixels.append(self.images)
        self.conversation.messages[-1][1] = "A cat."

    monkeypatch.setattr(ImageChat, "answer", answer)
    main(argument_parser().parse_args(arguments("--conv-mode", "v1")))
    printed = capsys.readouterr().out
    assert prompts == [1, 1, 1, 1]  # the second one has "What?" from the first, as an unreadable image changes nothing
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[2], pixels[3])
    assert not torch.equal(pixels[1], pixels[2])
    assert "Ctrl-D leaves" in printed.splitlines()[0]
    assert "no.png: no such image file" in printed and "/images: no such command" in printed


def test_a_missing_image_is_one_clear_error(golden_world: Path) -> None:
    with pytest.raises(OSError, match=r"no-such\.png"):
        load_image("no-such.png")


def test_a_text_model_is_refused(golden_world: Path) -> None:
    args = argument_parser().parse_args(arguments("--model-path", "tiny-vicuna"))
    with pytest.raises(ValueError, match="no vision tower"):
        main(args)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--image-file", "no-such.png", "no-such.png: no such image file"),
        ("--temperature", "-1", "temperature: found -1.0, expected 0"),
        ("--max-new-tokens", "0", "max_new_tokens: found 0, expected 1 or more"),
        ("--device", "gpu", "device: found 'gpu', expected cuda, cuda:N, cpu"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    golden_world: Path, monkeypatch: pytest.MonkeyPatch, flag: str, value: str, message: str
) -> None:
    monkeypatch.setattr(builder, "from_pretrained_strictly", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises((OSError, ValueError), match=re.escape(message)):
        main(argument_parser().parse_args(arguments(flag, value)))


def test_device_defaults_to_what_is_there(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = argument_parser().parse_args(["--model-path", "tiny-llava", "--image-file", "y"])
    monkeypatch.setattr(builder, "load_pretrained_model", lambda *args, device, **kwargs: device)
    assert load_model(args) == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("mode", "stop"),
    [("v1", "</s>"), ("llama_2", "</s>"), ("chatml_direct", "<|im_end|>"), ("v0", "###"), ("plain", "\n")],
)
def test_what_closes_an_answer(mode: str, stop: str) -> None:
    assert conv_templates[mode].stop_string == stop


@pytest.mark.parametrize(("role", "name"), [("USER", "USER"), ("<|im_start|>assistant\n", "assistant"), ("", "-")])
def test_roles_are_shown_without_the_marks_of_the_template(role: str, name: str) -> None:
    assert speaker_name(role) == name
