"""One question from the command line or from Python, as LLaVA's README shows it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import llava
from llava.conversation import conv_templates
from llava.eval import run_llava
from llava.eval.answering import GenerationSettings, Question, answer_questions
from llava.eval.run_llava import argument_parser, eval_model, image_parser, load_images
from llava.mm_utils import get_model_name_from_path
from llava.model import builder
from llava.model.builder import LoadedModel, load_pretrained_model

GOLDENS = Path(__file__).parents[2] / "goldens" / "llava"


def test_eval_model_takes_the_readmes_arguments(
    tiny: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = type(
        "Args",
        (),
        {
            "model_path": "tiny-llava",
            "model_base": None,
            "model_name": get_model_name_from_path("tiny-llava"),
            "query": "What is this?",
            "conv_mode": None,
            "image_file": "images/im0.png",
            "sep": ",",
            "temperature": 0,
            "top_p": None,
            "num_beams": 1,
            "max_new_tokens": 6,
        },
    )()
    eval_model(args)
    asked = Question(0, "What is this?", (Path("images/im0.png"),))
    settings = GenerationSettings(max_new_tokens=6)
    expected = next(answer_questions([asked], *tiny[:3], conv_templates["llava_v0"], settings)).text
    assert capsys.readouterr().out == f"{expected}\n"


def ask(**flags: Any) -> str:
    common = {"model_path": "tiny-llava", "temperature": 0, "max_new_tokens": 6, "conv_mode": "v1", "device": "cpu"}
    return eval_model(SimpleNamespace(**common, **flags))


def test_dtype_is_that_of_the_weights(golden_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[LoadedModel] = []

    def load(*arguments: Any, **options: Any) -> LoadedModel:
        loaded.append(load_pretrained_model(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(builder, "load_pretrained_model", load)
    ask(query="What is this?", image_file="images/im0.png", dtype="bfloat16")
    assert {weight.dtype for weight in loaded[0].model.parameters()} == {torch.bfloat16}


def test_chat_gives_the_answer_of_the_command_without_printing_it(
    golden_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"model_path": "tiny-llava", "temperature": 0, "query": "What is this?", "image_file": "images/im0.png"}
    expected = eval_model(SimpleNamespace(**flags))
    capsys.readouterr()
    picture = Image.open("images/im0.png")
    assert expected and llava.chat("tiny-llava", "images/im0.png", "What is this?") == expected
    assert llava.chat(Path("tiny-llava"), picture, "What is this?") == expected
    assert not capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        llava.chat("tiny-llava", "nothing.png", "?")


def test_chat_with_a_projector_captions(golden_world: Path) -> None:
    shutil.copytree(GOLDENS / "ckpt_stage1", "stage1")
    flags = {"model_path": "stage1", "model_base": "tiny-vicuna", "temperature": 0, "query": ""}
    expected = eval_model(SimpleNamespace(**flags, image_file="images/im0.png"))
    assert llava.chat("stage1", "images/im0.png", "", base="tiny-vicuna") == expected


def test_several_images_come_first_or_where_the_query_places_them(tiny: LoadedModel) -> None:
    both = (Path("images/im0.png"), Path("images/im1.png"))
    files = "images/im0.png;images/im1.png"
    settings = GenerationSettings(max_new_tokens=6)
    for query, text in (
        ("Compare.", "Compare."),
        ("Is <image-placeholder> like <image-placeholder>?", "Is <image> like <image>?"),
    ):
        expected = next(answer_questions([Question(0, text, both)], *tiny[:3], conv_templates["v1"], settings)).text
        assert ask(query=query, image_file=files, sep=";") == expected


def test_a_query_that_places_other_than_its_images_is_refused(
    golden_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_llava, "answers_of", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="question '--query': found 1 <image> in the text, expected 2"):
        ask(query="Is <image-placeholder> it?", image_file="images/im0.png,images/im1.png")


def test_another_template_than_the_checkpoints_is_said(golden_world: Path, caplog: pytest.LogCaptureFixture) -> None:
    ask(query="?", image_file="images/im0.png")
    assert "--conv-mode v1 is used; the checkpoint's own seems to be llava_v0" in caplog.text


def test_images_are_read_as_rgb(golden_world: Path) -> None:
    args = argument_parser().parse_args(
        ["--model-path", "m", "--query", "q", "--image-file", "images/im0.png+images/im1.png", "--sep", "+"]
    )
    assert image_parser(args) == ["images/im0.png", "images/im1.png"]
    assert [image.mode for image in load_images(image_parser(args))] == ["RGB", "RGB"]


def test_an_address_that_gives_no_image_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    page = SimpleNamespace(content=b"<html>", raise_for_status=lambda: None)
    monkeypatch.setattr("requests.get", lambda address, timeout: page)
    with pytest.raises(OSError, match=r"https://example\.org/cat: its image cannot be decoded"):
        load_images(["https://example.org/cat"])
