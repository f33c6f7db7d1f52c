"""Does the LLM look at the picture? How much likelier a caption is after its own picture than after others.

A caption is read after nine pictures, its own and eight others. Its score is the log of its probability after its own
less the log of its mean probability after all nine: 0 is blind, log 9 is the most. No masks are needed.

Letters: P pictures, N captions, L tokens of a row, C tokens of the longest caption, M vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from patch_aligned.images import decode_image, image_path
from patch_aligned.intervals import Resampling, ratios_of
from patch_aligned.models.base import VisionLanguageModel
from patch_aligned.models.language import LanguageModel, name_bounds
from patch_aligned.models.llava import CAPTION_REQUEST
from patch_aligned.models.load import load_models
from patch_aligned.models.transformers import is_of_transformers
from patch_aligned.pad import iter_records

PICTURES = 9
"""Pictures that a caption is read after, its own among them."""

Reader = Callable[[Sequence[Image.Image], Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Pictures and captions -> log-probability of each caption after each picture `[P, N]`, nats, and its tokens `[N]`."""


class Caption(NamedTuple):
    """A picture's path below the image folder, and what is said of it."""

    image_id: str
    text: str


def read_captions(path: Path) -> list[Caption]:
    """Read LLaVA's training file, of which the first answer is the caption, or PAD. Raises ValueError on under nine."""
    found = []
    for record in iter_records(path):
        said = [turn["value"] for turn in record.get("conversations", ()) if turn["from"] == "gpt"]
        image, caption = record.get("image", record.get("image_id")), record.get("caption") or next(iter(said), "")
        if image and caption:
            found.append(Caption(image, caption.strip()))
    if len(found) < PICTURES:
        expected = f"at least {PICTURES}: records with image and conversations, or with image_id and caption"
        raise ValueError(f"--data {path}: found {len(found)} pictures with a caption, expected {expected}.")
    return found


def open_reader(model: str, base: str | None = None, vision_tower: str | None = None, device: str = "cpu") -> Reader:
    """Load a whole model: a folder of LLaVA, with `base` and `vision_tower` as `load_models` takes them, or a folder or
    hub name of a model of transformers."""
    if is_of_transformers(model):
        whole: Any = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
        return transformers_reader(whole.to(device).eval(), AutoProcessor.from_pretrained(model))
    [loaded] = load_models([f"model={model}"], base, vision_tower, device=device)
    assert loaded.language is not None  # all of LLaVA's have one
    return llava_reader(loaded, loaded.language.load())


def llava_reader(model: VisionLanguageModel, language: LanguageModel) -> Reader:
    """Return a reader of LLaVA. Captions stand where stage 1, or the checkpoint's template, has them."""

    @torch.inference_mode()
    def read(images: Sequence[Image.Image], captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens = torch.stack(list(model.visual_tokens(model.encode(images))))  # [P, T, D]
        ids = [language.answer_ids(caption) for caption in captions]
        return language.log_probabilities(tokens, "", ids).cpu().numpy(), np.array([len(of_one) for of_one in ids])

    return read


def transformers_reader(model: Any, processor: Any) -> Reader:
    """Return a reader of any family. Captions follow the request of its chat template, or without one the picture."""
    prompt = processor.image_token
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": CAPTION_REQUEST}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompt = prompt.removeprefix(processor.tokenizer.bos_token or "")  # the processor adds it
        prompt += "" if prompt[-1].isspace() else " "

    def inputs(image: Image.Image, captions: Sequence[str]) -> Any:
        texts, images = [prompt + caption for caption in captions], [[image]] * len(captions)
        # On the left, so that all captions end with the row.
        made = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        return made.to(model.device, model.dtype)

    @torch.inference_mode()
    def read(images: Sequence[Image.Image], captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = []
        for image in images:
            given = inputs(image, captions)
            tokens = given["attention_mask"].sum(dim=1) - inputs(image, [""])["attention_mask"].sum()  # [N]
            longest = int(tokens.max())
            logits = model(**given, logits_to_keep=longest + 1).logits[:, -longest - 1 : -1]  # [N, C, M]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            target = given["input_ids"][:, -longest:, None]  # [N, L] -> [N, C, 1]
            log_p = logits.log_softmax(dim=-1).gather(2, target).squeeze(2).double()  # [N, C]
            is_caption = torch.arange(longest, 0, -1, device=tokens.device) <= tokens[:, None]  # [N, C]
            rows.append(log_p.where(is_caption, 0).sum(dim=1))
        return torch.stack(rows).cpu().numpy(), tokens.cpu().numpy()

    return read


def measure_reads(
    reader: Reader,
    captions: Sequence[Caption],
    image_folder: Path,
    seed: int = 0,
    on_images: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    """Read captions after groups of nine pictures, which the seed draws.

    Returns:
        A row for each caption: `image_id`, `caption`, `group`, `tokens`; `reads_nats`, the score; `loss_nats`, the
        caption's negative log-likelihood after its own picture.
    """
    order = np.random.default_rng(seed).permutation(len(captions))
    parts = []
    for first in range(0, len(captions), PICTURES):
        start = min(first, len(captions) - PICTURES)  # the last group is filled up with captions that were read before
        group = [captions[index] for index in order[start : start + PICTURES]]
        images = [decode_image(image_path(image_folder, caption.image_id)) for caption in group]
        log_p, tokens = reader(images, [caption.text for caption in group])  # [P, P], [P]
        scores = {"tokens": tokens, "reads_nats": name_bounds(log_p).diagonal(), "loss_nats": -log_p.diagonal()}
        parts.append(
            pd.DataFrame(group).rename(columns={"text": "caption"}).assign(group=start, **scores)[first - start :]
        )
        on_images(first + len(parts[-1]))
    return pd.concat(parts, ignore_index=True)


def reads_metrics(rows: pd.DataFrame, resampling: Resampling) -> pd.DataFrame:
    """Means over captions and tokens with intervals, which draw whole groups, since their pictures are shared."""
    of_groups = rows.assign(captions=1).groupby("group")[["reads_nats", "loss_nats", "captions", "tokens"]].sum()
    sums, counts = of_groups[["reads_nats", "reads_nats", "loss_nats"]], of_groups[["captions", "tokens", "tokens"]]
    names = ("reads_per_caption", "reads_per_token", "loss_per_token")
    found = ratios_of(sums.to_numpy(float), counts.to_numpy(float), resampling, names)
    return found.drop(columns="images")


def reads_json(settings: Mapping[str, Any], metrics: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Return the settings, the metrics and each caption's score as JSON."""
    report = {
        **settings,
        "pictures": PICTURES,
        "metrics": metrics.to_dict("index"),
        "captions": rows.to_dict("records"),
    }
    return json.dumps(report, indent=2) + "\n"
