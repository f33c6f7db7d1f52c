"""Phrases of a file, of captions and of vision-language models: read strictly, or refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from patch_aligned.annotate import taggers
from patch_aligned.annotate.pipeline import Failure, ImageInWork
from tests.answering import json_server, saying

IMAGES = ["a.jpg", "b/c.jpg"]


def items(*captions: str) -> list[ImageInWork]:
    return [ImageInWork(name, Image.new("RGB", (2000, 20)), caption)
            for name, caption in zip(IMAGES, captions or ("", ""), strict=False)]  # fmt: skip


def names(found: Any) -> list[list[str]]:
    return [[tag.name for tag in of_image] for of_image in found]


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def run(*records: Any) -> Path:
        path = tmp_path / "phrases.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return run


def test_a_file_gives_the_phrases_of_each_picture_in_order_and_once(write: Write) -> None:
    path = write(
        {"image_id": "./b/c.jpg", "phrases": []},
        {"image_id": "elsewhere.jpg", "phrases": ["cow"]},
        {"image_id": "a.jpg", "phrases": ["Red  car.", " dog", "red car", "...", "Bär"], "source": "mine"},
    )
    tagger = taggers.of_file(path, IMAGES)
    assert names(tagger.tag(items())) == [["red car", "dog", "Bär"], []]
    assert tagger.tag(items())[0][0]._asdict() == {"name": "red car", "score": None}
    assert {"red car", "dog", "Bär"} <= set(tagger.tags)
    same, other = (taggers.of_file(write({"image_id": "a.jpg", "phrases": [name]}), []) for name in ("dog", "cat"))
    assert same.settings["kind"] == "file" and same.settings != other.settings


def test_pictures_without_a_record_are_named_before_the_run(write: Write) -> None:
    path = write({"image_id": "a.jpg", "phrases": ["dog"]})
    with pytest.raises(ValueError, match=r"phrases\.jsonl: found no record of 1 of 2 images, such as 'b/c\.jpg'"):
        taggers.of_file(path, IMAGES)


@pytest.mark.parametrize(
    "record",
    [
        ["a.jpg", ["dog"]], {"image_id": 7, "phrases": []}, {"phrases": ["dog"]}, {"image_id": "a.jpg"},
        {"image_id": "a.jpg", "phrases": "dog"}, {"image_id": "a.jpg", "phrases": [1]},
        {"image_id": "a.jpg", "phrases": ["dog " * 30]}, {"image_id": "a.jpg", "phrases": ["\ud800"]},
    ],
)  # fmt: skip
def test_records_that_break_the_format_are_named(write: Write, record: Any) -> None:
    path = write({"image_id": "x.jpg", "phrases": []}, record)
    with pytest.raises(ValueError, match=r"phrases\.jsonl: record 1: found .*, expected `image_id` and `phrases`"):
        taggers.of_file(path, ["x.jpg"])


def test_a_second_record_of_a_picture_does_not_replace_the_first(write: Write) -> None:
    path = write({"image_id": "a.jpg", "phrases": ["dog"]}, {"image_id": "./a.jpg", "phrases": ["cat"]})
    with pytest.raises(ValueError, match=r"phrases\.jsonl: record 1: found 'a\.jpg' a second time"):
        taggers.of_file(path, ["a.jpg"])


def token(text: str, pos: str) -> SimpleNamespace:
    return SimpleNamespace(text_with_ws=f"{text} ", pos_=pos)


def test_captions_give_their_noun_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [
        [token("two", "NUM"), token("red", "ADJ"), token("cars", "NOUN")],
        [token("it", "PRON")],
        [token("the", "DET"), token("Eiffel", "PROPN"), token("Tower", "PROPN")],
        [token("her", "PRON"), token("Red", "ADJ"), token("Cars", "NOUN")],
        [token("x" * 100, "NOUN")],
    ]
    parser = SimpleNamespace(meta={"version": "3.8"})
    spacy = SimpleNamespace(load=lambda name: Parser(), __version__="3.8.0")

    class Parser:
        meta = parser.meta

        def __call__(self, text: str) -> Any:
            return SimpleNamespace(noun_chunks=chunks if text else [])

    monkeypatch.setitem(sys.modules, "spacy", spacy)
    tagger = taggers.of_captions("en_core_web_sm", ["", "two red cars"])
    assert names(tagger.tag(items("two red cars", ""))) == [["Red Cars", "Eiffel Tower"], []]
    assert tagger.settings == {"kind": "captions", "pipeline": "en_core_web_sm", "versions": "3.8.0, 3.8"}


def test_chunks_of_a_parse_of_spacy() -> None:
    spacy = pytest.importorskip("spacy", reason="spaCy is no part of the extras")
    words = ["A", "man", "'s", "red", "hat", "lies", "on", "the", "two", "wooden", "tables", "."]
    parse = spacy.tokens.Doc(
        spacy.blank("en").vocab,
        words,
        spaces=[True, False, True, True, True, True, True, True, True, True, False, False],
        pos=["DET", "NOUN", "PART", "ADJ", "NOUN", "VERB", "ADP", "DET", "NUM", "ADJ", "NOUN", "PUNCT"],
        heads=[1, 4, 1, 4, 5, 5, 5, 10, 10, 10, 6, 5],
        deps=["det", "poss", "case", "amod", "nsubj", "ROOT", "prep", "det", "nummod", "amod", "pobj", "punct"],
    )
    assert taggers.noun_chunks(parse) == ["man's red hat", "wooden tables"]


def test_what_captions_need_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--tagger captions: found no caption of any image"):
        taggers.of_captions("en_core_web_sm", ["", ""])
    monkeypatch.setitem(sys.modules, "spacy", None)
    command = r"pip install spacy && python -m spacy download en_core_web_sm$"
    with pytest.raises(ValueError, match=rf"no pipeline 'en_core_web_sm' of spaCy here .*{command}"):
        taggers.of_captions("en_core_web_sm", ["a dog"])

    def no_pipeline(name: str) -> None:
        raise OSError(f"[E050] Can't find model '{name}'.\nMore.")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=no_pipeline))
    with pytest.raises(ValueError, match=rf"E050.*{command}"):
        taggers.of_captions("en_core_web_sm", ["a dog"])


@pytest.mark.parametrize(
    ("answer", "phrases"),
    [
        ('["dog", "Red car", "red  CAR.", ""]', ["dog", "red CAR"]),
        ('```json\n["dog",\n "sky"]\n```', ["dog", "sky"]),
        (" []\n", []),
    ],
)
def test_answers_are_a_json_list(answer: str, phrases: list[str]) -> None:
    assert names([taggers.read_answer(answer)]) == [phrases]


@pytest.mark.parametrize(
    "answer",
    ["", "dog, cat", "- dog\n- cat", 'Sure! ["dog"]', '["dog", "cat', '{"objects": ["dog"]}', '["dog", 7]', '"dog"',
     f'["{"dog " * 30}"]', '["\\ud800"]', "[" * 5000, "\ud800"],
)  # fmt: skip
def test_other_answers_fail_for_their_picture_and_are_quoted(answer: str) -> None:
    failure = taggers.read_answer(answer)
    assert isinstance(failure, Failure) and failure.status == "unparsable"
    assert "expected a JSON list of short strings" in failure.reason
    assert len(failure.reason.encode()) < 200  # it goes into a shard


def test_a_picture_whose_answer_fails_is_one_alone_and_models_see_no_large_pictures() -> None:
    sizes = []

    def ask(images: Any) -> list[str]:
        sizes.extend(image.size for image in images)
        return ['["dog"]', "no list"]

    tagger = taggers.of_answers(ask, {"model": "m"})
    pictures = items()
    first, second = tagger.tag(pictures)
    assert names([first]) == [["dog"]] and isinstance(second, Failure)
    assert sizes == [(1024, 10)] * 2 and pictures[0].image.size == (2000, 20)
    assert tagger.settings["question"] == taggers.QUESTION and tagger.settings["model"] == "m"


Asked = list[tuple[str | None, dict[str, Any]]]


@pytest.fixture
def asked() -> Asked:
    """Keys and documents that the server was sent."""
    return []


@pytest.fixture
def server(asked: Asked) -> Iterator[str]:
    """Lists two things, as an OpenAI-compatible server of the model `m` would."""

    def answer(path: str, headers: Any, document: dict[str, Any]) -> tuple[int, Any]:
        asked.append((headers["Authorization"], document))
        known = path == "/v1/chat/completions" and document["model"] == "m"
        return (200, saying(json.dumps(["dog", "sky"]))) if known else (404, {"error": "?"})

    with json_server(answer) as address:
        yield f"{address}/v1"


def test_a_server_is_asked_about_each_picture(server: str, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_API_KEY", "secret")
    tagger = taggers.of_answers(taggers.ask_server(f"{server}/", "m"), {"server_model": "m"})
    assert names(tagger.tag(items())) == [["dog", "sky"]] * 2
    keys, (document, _) = zip(*asked, strict=True)
    assert keys == ("Bearer secret",) * 2
    assert "secret" not in json.dumps(tagger.settings)
    (message,) = document["messages"]
    assert message["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert message["content"][1] == {"type": "text", "text": taggers.QUESTION}
    assert document["temperature"] == 0


def test_a_server_that_does_not_answer_ends_the_run_by_name(server: str) -> None:
    with pytest.raises(OSError, match=rf"--vlm_url {server}: .*404.*Finished shards are kept: run the same command"):
        taggers.ask_server(server, "other")([Image.new("RGB", (2, 2))])
    with pytest.raises(OSError, match=r"--vlm_url http://127\.0\.0\.1:9: found no answer"):
        taggers.ask_server("http://127.0.0.1:9", "m")([Image.new("RGB", (2, 2))])


def test_a_model_of_transformers_is_asked_in_its_own_chat_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, Idefics3Config, Idefics3ImageProcessorPil, Idefics3Processor

    from patch_aligned.models.tiny import tiny_copy

    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    from measured_models import byte_tokenizer

    tile = 56
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * tile}, max_image_size={"longest_edge": tile})
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = Idefics3Processor(images, byte_tokenizer(512), image_seq_len=4, chat_template=template)
    vision = {"image_size": tile, "patch_size": 14}
    text = {"model_type": "llama", "vocab_size": len(processor.tokenizer)}
    config = Idefics3Config(
        image_token_id=processor.image_token_id, vision_config=vision, text_config=text, scale_factor=2
    )
    model = tiny_copy(config, auto_class=AutoModelForImageTextToText)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(taggers, "_MOST_TOKENS", 6)
    pictures = [Image.new("RGB", size, "green") for size in ((80, 60), (60, 90))]
    found = taggers.ask_model(tmp_path, "cpu", None)(pictures)
    for picture, answer in zip(pictures, found, strict=True):
        inputs = processor(text=f"<image>{taggers.QUESTION}", images=[picture], return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert answer == processor.batch_decode(tokens, skip_special_tokens=True)[0]
