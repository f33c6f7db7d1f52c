"""One loop: answers in order, the same whatever the batch, and each thing that is wrong said at the start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.eval import answering
from llava.eval.answering import GenerationSettings, Question, answer_questions, prompt_of
from llava.eval.vqa_files import open_image
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import LoadedModel

SETTINGS = GenerationSettings(max_new_tokens=8)


def texts(tiny: LoadedModel, questions: list[Question], settings: GenerationSettings = SETTINGS, **options: Any) -> Any:
    template = options.pop("template", conv_templates["v1"])
    return [answer.text for answer in answer_questions(questions, *tiny[:3], template, settings, **options)]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("mode", "asked"),
    [
        ("v1", ["What is in the picture?", "Is it night?", "Name three colours."]),
        ("plain", [""]),
        ("llava_llama_2", ["Describe the scene."]),
    ],
)
def test_answers_are_upstreams(tiny: LoadedModel, goldens: Path, mode: str, asked: list[str]) -> None:
    cases = [case for case in json.loads((goldens / "g_generate.json").read_text()) if case["mode"] == mode]
    images = [() if case["image"] is None else (Path(f"images/im{case['image']}.png"),) for case in cases]
    questions = [Question(place, text, images[place]) for place, text in enumerate(asked)]
    settings = GenerationSettings(max_new_tokens=16)
    answers = list(answer_questions(questions, *tiny[:3], conv_templates[mode], settings, batch_size=8))
    assert [answer.prompt for answer in answers] == [case["prompt"] for case in cases]
    # The ids decoded here: of bytes that are no text, this stack's tokenizer keeps less than the original's.
    recorded = [tiny.tokenizer.decode(case["output_ids"], skip_special_tokens=True).strip() for case in cases]
    assert [answer.text for answer in answers] == recorded


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 4), (3, 1), (4, 2), (16, 4)])
def test_answers_come_in_order_and_are_those_of_one_at_a_time(
    tiny: LoadedModel, mixed_questions: list[Question], batch_size: int, workers: int
) -> None:
    one_by_one = [texts(tiny, [question])[0] for question in mixed_questions]
    template = conv_templates["v1"]
    answers = list(
        answer_questions(mixed_questions, *tiny[:3], template, SETTINGS, batch_size=batch_size, workers=workers)
    )
    assert [answer.question for answer in answers] == mixed_questions
    assert [answer.text for answer in answers] == one_by_one
    assert len(set(one_by_one)) > 6


def test_an_image_is_a_path_or_bytes_or_a_picture(tiny: LoadedModel) -> None:
    path = Path("images/im1.png")
    forms: list[Any] = [path, str(path), path.read_bytes(), Image.open(path)]
    answers = texts(tiny, [Question(place, "What?", (image,)) for place, image in enumerate(forms)], batch_size=4)
    assert len(set(answers)) == 1
    assert open_image(Image.new("L", (4, 4))).mode == "RGB"


def test_a_picture_that_is_not_read_yet_may_be_shared_by_questions(tiny: LoadedModel, tmp_path: Path) -> None:
    noise = torch.randint(256, (1500, 1500, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "noise.png")
    questions = [Question("q", "What?", (Image.open(tmp_path / "noise.png"),))] * 4
    assert len(set(texts(tiny, questions, GenerationSettings(max_new_tokens=2)))) == 1


def test_questions_in_a_row_about_an_image_read_it_once(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr(answering, "open_image", lambda image, owner: read.append(image) or open_image(image, owner))
    images = ["im1", "im1", "im1", "im2", "im1"]
    questions = [Question(place, "What?", (f"images/{name}.png",)) for place, name in enumerate(images)]
    answers = texts(tiny, questions)
    assert read == ["images/im1.png", "images/im2.png", "images/im1.png"]
    assert answers == [texts(tiny, [question])[0] for question in questions]


@pytest.mark.parametrize("content", [b"no image", b"cut off"])
def test_an_image_that_cannot_be_read_is_told_with_its_question(tiny: LoadedModel, content: bytes) -> None:
    image = Path("images/im0.png").read_bytes()[:-300] if content == b"cut off" else content
    with pytest.raises(OSError, match=r"question 'q7': its image cannot be decoded \(.+\)"):
        texts(tiny, [Question("q7", "What?", (image,))])


def test_a_prompt_beyond_the_length_of_training_is_read_whole(
    tiny: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    questions = [Question("q", "What is this? " * 9, (Path("images/im0.png"),)), Question("p", "And? " * 30)]
    expected = texts(tiny, questions)
    assert not caplog.messages
    tiny.model.config.tokenizer_model_max_length = 20
    assert texts(tiny, questions, batch_size=2) == expected
    tiny.model.config.max_position_embeddings = 20
    texts(tiny, questions[:1] * 2)
    length = len(tokenizer_image_token(prompt_of(questions[0], conv_templates["v1"]), tiny.tokenizer)) + 15
    assert [message.split(",")[0] for message in caplog.messages] == [f"question 'q': its prompt has {length} tokens"]


def test_an_answer_ends_where_the_template_closes_it(tiny: LoadedModel) -> None:
    question = Question("q", "What is this?", (Path("images/im0.png"),))
    full = texts(tiny, [question])[0]
    stop = full[len(full) // 2 :][:2]
    template = replace(conv_templates["v1"].copy(), sep2=stop)
    assert texts(tiny, [question, question], template=template, batch_size=2) == [full.split(stop)[0].strip()] * 2


@pytest.mark.parametrize(
    ("mode", "text", "images", "ending"),
    [
        ("v1", "Why?", 1, "USER: <image>\nWhy? ASSISTANT:"),
        ("v1", "Why?", 2, "USER: <image>\n<image>\nWhy? ASSISTANT:"),
        ("v1", "Why?", 0, "USER: Why? ASSISTANT:"),
        ("v1", "Is <image> like <image>?", 2, "USER: Is <image> like <image>? ASSISTANT:"),
        ("plain", "", 1, "<image>"),
        ("plain", "A photo of", 1, "<image>A photo of"),
    ],
)
def test_images_come_first_unless_the_text_places_them(mode: str, text: str, images: int, ending: str) -> None:
    prompt = prompt_of(Question("q", text, (Path("x.png"),) * images), conv_templates[mode])
    assert prompt.endswith(ending)
    assert prompt == ending or mode != "plain"


def test_marks_around_images_follow_the_checkpoint() -> None:
    prompt = prompt_of(Question("q", "Why?", (Path("x.png"),)), conv_templates["v1"], mm_use_im_start_end=True)
    assert "<im_start><image><im_end>\nWhy?" in prompt


def test_a_text_that_does_not_fit_its_images_is_refused() -> None:
    with pytest.raises(ValueError, match="question 'q7': found 1 <image> in the text, expected 2"):
        prompt_of(Question("q7", "Is <image> it?", (Path("x"), Path("y"))), conv_templates["v1"])


def test_missing_images_are_named_before_anything_is_answered(tiny: LoadedModel) -> None:
    questions = [
        Question("a", "?", (Path("images/im0.png"),)),
        *(Question(n, "?", (Path(f"no{n}.png"),)) for n in "bc"),
    ]
    with pytest.raises(
        FileNotFoundError, match=r"question 'b': no such image file nob\.png \(2 of 3 images are missing\)"
    ):
        answer_questions(questions, *tiny[:3], conv_templates["v1"])


def test_a_model_without_vision_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(ValueError, match="no vision tower"):
        answer_questions([Question("a", "?")], tiny.tokenizer, tiny.model, None, conv_templates["v1"])


def test_a_batch_too_large_for_the_device_is_halved_once_for_all(
    tiny: LoadedModel,
    mixed_questions: list[Question],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = texts(tiny, mixed_questions)
    generate = answering.generate_sharing
    sizes: list[int] = []

    def with_little_memory(model: Any, prompts: list[list[int]], images: list[Any], *rest: Any, **options: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2 or len(images) > 2:
            raise torch.OutOfMemoryError
        return generate(model, prompts, images, *rest, **options)

    monkeypatch.setattr(answering, "generate_sharing", with_little_memory)
    assert texts(tiny, mixed_questions, batch_size=8) == expected
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    assert [message[-5:] for message in caplog.messages] == ["now 4", "now 2"]


def test_draws_follow_the_seed_and_leave_the_programs_own_draws_alone(
    tiny: LoadedModel, mixed_questions: list[Question]
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2).tolist()
    torch.manual_seed(5)
    texts(tiny, mixed_questions[:1])
    first = texts(tiny, mixed_questions, GenerationSettings(1.0, seed=1, max_new_tokens=8), batch_size=4)
    assert torch.rand(2).tolist() == expected
    assert first == texts(tiny, mixed_questions, GenerationSettings(1.0, seed=1, max_new_tokens=8), batch_size=4)
    assert first != texts(tiny, mixed_questions, GenerationSettings(1.0, seed=2, max_new_tokens=8), batch_size=4)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0.0}, {"num_beams": 0}, {"max_new_tokens": 0}])
def test_settings_without_meaning_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GenerationSettings(**wrong)
