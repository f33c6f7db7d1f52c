"""Phrases from elsewhere than RAM: a file, the noun chunks of captions, or a vision-language model."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Annotated, Any

import requests
import torch
from PIL import Image
from pydantic import StringConstraints, TypeAdapter, ValidationError
from transformers import pipeline

from patch_aligned.annotate.pipeline import Failure, ImageInWork
from patch_aligned.annotate.regions import Tag
from patch_aligned.files import sha256_of
from patch_aligned.record_files import iter_records, quoted

LONGEST_PHRASE = 80  # characters, which fit into a prompt of Grounding DINO in any script
_PHRASES = TypeAdapter(list[Annotated[str, StringConstraints(strict=True, max_length=LONGEST_PHRASE)]])


def distinct(phrases: Iterable[str]) -> list[str]:
    """Return phrases in order, each once whatever its case and blanks; without those that have no letter or digit."""
    texts = [" ".join(phrase.split()).strip(".,;:") for phrase in phrases]
    return list({text.casefold(): text for text in texts if any(map(str.isalnum, text))}.values())


@dataclass(frozen=True)
class PhraseTagger:
    """Gives the phrases of each of some images by `tag`; `tags` are those that are known before the first image."""

    settings: dict[str, Any]
    tag: Callable[[Sequence[ImageInWork]], list[list[Tag] | Failure]]
    tags: Sequence[str] = ()
    key: str = "tagger"


def of_file(path: Path, image_ids: Collection[str]) -> PhraseTagger:
    """Read the phrases of images from records such as `{"image_id": "00000/1.jpg", "phrases": ["dog", "red car"]}`."""
    phrases_of: dict[str, list[str]] = {}
    shared: dict[str, str] = {}  # one text for all images
    for number, record in enumerate(iter_records(path)):
        try:
            phrases = distinct(_PHRASES.validate_python(record["phrases"]))
            image_id = str(PurePosixPath(record["image_id"]))
        except (LookupError, TypeError, ValidationError) as error:
            raise ValueError(
                f"--phrases {path}: record {number}: found {quoted(record)}, expected `image_id` and `phrases`, a list "
                f"of texts of up to {LONGEST_PHRASE} characters"
            ) from error
        if image_id in phrases_of:
            raise ValueError(
                f"--phrases {path}: record {number}: found {image_id!r} a second time, expected one record an image, "
                "with all its phrases"
            )
        phrases_of[image_id] = [shared.setdefault(one, one) for one in phrases]
    if missing := [image_id for image_id in image_ids if image_id not in phrases_of]:
        raise ValueError(
            f"--phrases {path}: found no record of {len(missing):,} of {len(image_ids):,} images, such as "
            f"{missing[0]!r}; expected one of each, with an empty list where there is nothing to find"
        )
    settings = {"kind": "file", "phrases_sha256": sha256_of(path)}
    return PhraseTagger(settings, lambda items: [list(map(Tag, phrases_of[i.image_id])) for i in items], list(shared))


def of_captions(name: str, captions: Iterable[str]) -> PhraseTagger:
    """Give the noun chunks of captions, by a pipeline of spaCy."""
    if not any(captions):
        raise ValueError("--tagger captions: found no caption of any image. Give --images a list with captions")
    try:
        import spacy

        parse, lock = spacy.load(name), Lock()
    except (ImportError, OSError) as error:
        raise ValueError(
            f"--tagger captions: found no pipeline {name!r} of spaCy here ({str(error).splitlines()[0]}). Install it: "
            f"pip install spacy && python -m spacy download {name}"
        ) from error

    def tag(items: Sequence[ImageInWork]) -> list[list[Tag] | Failure]:
        with lock:
            return [list(map(Tag, noun_chunks(parse(item.caption)))) for item in items]

    version = f"{spacy.__version__}, {parse.meta.get('version')}"
    return PhraseTagger({"kind": "captions", "pipeline": name, "versions": version}, tag)


def noun_chunks(parse: Any) -> list[str]:
    """Return the noun chunks of spaCy's parse of a text, without articles, pronouns and numbers."""
    left_out = ("DET", "PRON", "NUM", "PUNCT")
    chunks = ([token.text_with_ws for token in chunk if token.pos_ not in left_out] for chunk in parse.noun_chunks)
    return distinct(text for text in map("".join, chunks) if len(text) <= LONGEST_PHRASE)


QUESTION = (
    "List the objects in this image, and the stuff, such as sky, grass, water or wall. Name each kind once, by a noun "
    "phrase of one to three words without an article. Answer with a JSON list of strings and nothing else."
)
_LONGEST_SIDE_PX = 1024  # of a larger image, the model sees a smaller copy
_MOST_TOKENS = 512  # of an answer
Ask = Callable[[Sequence[Image.Image]], Sequence[str]]  # puts `QUESTION` to a model, for each of some images


def of_answers(ask: Ask, identity: Mapping[str, Any]) -> PhraseTagger:
    """Give what a vision-language model lists; `identity` is what settings.json records of the model."""

    def tag(items: Sequence[ImageInWork]) -> list[list[Tag] | Failure]:
        copies = [item.image.copy() for item in items]
        for image in copies:
            image.thumbnail((_LONGEST_SIDE_PX, _LONGEST_SIDE_PX))
        return list(map(read_answer, ask(copies)))

    asked = {"question": QUESTION, "longest_side_px": _LONGEST_SIDE_PX, "most_tokens": _MOST_TOKENS}
    return PhraseTagger({"kind": "vlm", **asked, **identity}, tag)


def read_answer(answer: str) -> list[Tag] | Failure:
    """Read a JSON list of phrases, which may stand in a Markdown block; any other answer is a failure of its image."""
    try:
        text = answer.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
        return list(map(Tag, distinct(_PHRASES.validate_json(text))))
    except ValidationError:
        return Failure("unparsable", f"found the answer {quoted(answer)}, expected a JSON list of short strings")


def ask_model(folder: Path, device: str, dtype: Any) -> Ask:
    """Load an image-text model of transformers. None of the checkpoint's own code is run."""
    dtype, lock = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32), Lock()
    model: Any = pipeline("image-text-to-text", str(folder), device=device, dtype=dtype)
    model.processor.tokenizer.padding_side = "left"
    options = {"max_new_tokens": _MOST_TOKENS, "do_sample": False}

    def ask(images: Sequence[Image.Image]) -> list[str]:
        chats = [_chat({"type": "image", "image": image}) for image in images]
        with lock:
            answers = model(text=chats, batch_size=len(chats), return_full_text=False, generate_kwargs=options)
        return [answer["generated_text"] for (answer,) in answers]

    return ask


def ask_server(url: str, model: str) -> Ask:
    """Ask an OpenAI-compatible server, such as vLLM's, about all images at once. VLM_API_KEY is its key, if any."""
    headers = {"Authorization": f"Bearer {key}"} if (key := os.environ.get("VLM_API_KEY")) else {}

    def answer(image: Image.Image) -> str:
        image.save(file := io.BytesIO(), "PNG")
        url_of_image = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        chat = _chat({"type": "image_url", "image_url": {"url": url_of_image}})
        asked: Any = {"model": model, "messages": chat, "max_tokens": _MOST_TOKENS, "temperature": 0}
        try:
            response = requests.post(f"{url.rstrip('/')}/chat/completions", json=asked, headers=headers, timeout=600)
            response.raise_for_status()
            return str(response.json()["choices"][0]["message"]["content"])
        except (requests.RequestException, LookupError, TypeError) as error:
            raise OSError(
                f"--vlm_url {url}: found no answer ({error!r}), expected an OpenAI-compatible server of the model "
                f"{model}. Finished shards are kept: run the same command again"
            ) from error

    def ask(images: Sequence[Image.Image]) -> list[str]:
        with ThreadPoolExecutor(len(images)) as askers:
            return list(askers.map(answer, images))

    return ask


def _chat(image: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]
