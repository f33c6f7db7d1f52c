"""Does the LLM look at the picture? How much likelier a caption is after its own picture than after others.

A caption is read after nine pictures, its own and eight others. Its score is the log of its probability after its own
less the log of its mean probability after all nine: 0 is blind, log 9 is the most. No masks are needed.

Letters: P pictures, N captions.
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

from patch_aligned.images import decode_image, image_path
from patch_aligned.intervals import Resampling, ratios_of
from patch_aligned.models.base import ReadingModel, VisionLanguageModel
from patch_aligned.models.language import name_bounds
from patch_aligned.models.load import load_models
from patch_aligned.models.transformers import is_of_transformers
from patch_aligned.models.whole import TransformersSource
from patch_aligned.record_files import iter_records

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
        return reader_of(TransformersSource(model, device).load())
    [loaded] = load_models([f"model={model}"], base, vision_tower, device=device)
    assert loaded.language is not None  # all of LLaVA's have one
    return reader_of(loaded.language.load(), loaded)


def reader_of(language: ReadingModel, model: VisionLanguageModel | None = None) -> Reader:
    """Return a reader. Captions stand where the LLM's template, or stage 1, has them.

    Args:
        language: the whole LLM.
        model: encoder and projector before it, which take pictures together; None if `language` reads pictures itself,
            one at a time.
    """

    @torch.inference_mode()
    def read(images: Sequence[Image.Image], captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [language.answer_ids(caption) for caption in captions]
        groups = [[image] for image in images] if model is None else [images]
        log_p = torch.cat([language.log_probabilities(language.see(model, group), "", ids) for group in groups])
        return log_p.cpu().numpy(), np.array([len(of_one) for of_one in ids])  # [P, N], [N]

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
