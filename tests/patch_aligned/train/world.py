"""A tiny world to train in: images of four coloured quarters, whose regions are labelled with the names of colours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from patch_aligned.masks import rle_of_mask
from patch_aligned.models.tiny import tiny_copy
from patch_aligned.models.tokens import visual_tokens
from patch_aligned.train.regions import RegionCollator
from patch_aligned.train.trainer import PatchAlignment, train_projector_only
from tests.patch_aligned.models.families import FAMILIES, tokenizer

COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 230),
    "yellow": (230, 230, 30),
    "purple": (200, 30, 200),
    "cyan": (30, 220, 220),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}
SIZE = (224, 168)


@cache
def processor_of(name: str) -> Any:
    processor = FAMILIES[name].make_processor()
    processor.tokenizer = copy.deepcopy(tokenizer())
    processor.tokenizer.add_tokens(list(COLOURS))
    processor.tokenizer.padding_side = "right"
    return processor


def model_of(name: str, projector_only: bool = True) -> Any:
    model = tiny_copy(FAMILIES[name].make_config(), auto_class=AutoModelForImageTextToText).train()
    if projector_only:
        train_projector_only(model)
    return model


def sample_of(number: int, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """An image of four quarters of different colours with a little noise, and their regions."""
    random = np.random.default_rng(number)
    width, height = size
    pixels = random.integers(-5, 6, (height, width, 3))
    regions = []
    for quarter, tag in enumerate(random.permutation(list(COLOURS))[:4].tolist()):
        top, left = height // 2 * (quarter // 2), width // 2 * (quarter % 2)
        mask = np.zeros((height, width), dtype=bool)
        mask[top : top + height // 2, left : left + width // 2] = True
        pixels[mask] += COLOURS[tag]
        regions.append({"tag": tag, "rle_mask": rle_of_mask(mask), "image": 0})
    return {"id": f"n{number}", "images": [Image.fromarray(pixels.clip(0, 255).astype(np.uint8))], "regions": regions}


def captioned(name: str, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples with a prompt and an answer."""
    image = processor_of(name).image_token
    return [
        sample | {"prompt": f"image {image}" * len(sample["images"]) + " what is", "completion": " a cat"}
        for sample in samples
    ]


def collator_of(name: str) -> Callable[[list[dict[str, Any]]], Any]:
    """As users of the plain Trainer write it: everything but padding is a label."""
    processor = processor_of(name)

    def collate(samples: list[dict[str, Any]]) -> Any:
        texts = [sample["prompt"] + sample["completion"] for sample in samples]
        images = [sample["images"] for sample in samples]
        batch = processor(text=texts, images=images if any(images) else None, padding=True, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    return collate


def remembering(collate: Callable[[list[dict[str, Any]]], Any]) -> Callable[[list[dict[str, Any]]], Any]:
    """The collator, which processes the pixels of equal batches once: that takes longer than tiny models do."""
    kept: dict[tuple[str, ...], Any] = {}

    def collate_once(samples: list[dict[str, Any]]) -> Any:
        key = tuple(sample["id"] + sample["prompt"] + sample["completion"] for sample in samples)
        if key not in kept:
            kept[key] = collate(samples)
        return copy.copy(kept[key])

    return collate_once


def arguments_of(folder: Path, cls: Any = TrainingArguments, **more: Any) -> Any:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "learning_rate": 0.03,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "remove_unused_columns": False,
        "seed": 0,
    }
    return cls(**settings | more)


def trainer_of(
    name: str,
    folder: Path,
    beta: tuple[float, float] | None = (0, 5),
    rows: Any = None,
    model: Any = None,
    regions: Any = "regions",
    grids: Any = "all",
    warmup_steps: int = 0,
    **arguments: Any,
) -> Any:
    """The plain Trainer with the patch loss; without it where beta is None."""
    trainer = Trainer(
        model=model if model is not None else model_of(name),
        args=arguments_of(folder, **arguments),
        train_dataset=rows if rows is not None else captioned(name, [sample_of(number) for number in range(16)]),
        data_collator=remembering(collator_of(name)),
        processing_class=processor_of(name),
    )
    if beta is not None:
        PatchAlignment(regions, beta, grids=grids, warmup_steps=warmup_steps).attach(trainer)
    return trainer


def sft_trainer(
    name: str,
    folder: Path,
    beta: tuple[float, float] | None = (0, 5),
    rows: Any = None,
    regions: Any = "regions",
    **arguments: Any,
) -> Any:
    """TRL's trainer with its own collator and its own columns."""
    trl = pytest.importorskip("trl", reason="trl is part of the extra `train`")
    settings = {"max_length": None, "remove_unused_columns": True, "gradient_checkpointing": False} | arguments
    rows = rows if rows is not None else captioned(name, [sample_of(number) for number in range(16)])
    trainer = trl.SFTTrainer(
        model=model_of(name),
        args=arguments_of(folder, trl.SFTConfig, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor_of(name),
    )
    if beta is not None:
        PatchAlignment(regions, beta).attach(trainer)
    return trainer


@torch.no_grad()
def held_out_retrieval(name: str, trainer: Any) -> float:
    """Share of regions of unseen images whose nearest label of all eight is their own."""
    samples = captioned(name, [sample_of(1000 + number) for number in range(8)])
    collator = trainer.data_collator
    batch = RegionCollator(
        collator_of(name), collator.processor, collator.objective, collator.token_id, "regions", "image_id"
    )(samples)
    targets = batch.pop("patch_targets")
    assert len(targets["label_ids"]) == len(COLOURS)
    model = trainer.model.eval()
    tokens = visual_tokens(model, batch)
    embed = model.get_input_embeddings()
    _, metrics = collator.objective.loss(tokens, targets["image_row"], targets, embed)
    return metrics["patch/retrieval"].item()


def uneven_rows(name: str) -> list[dict[str, Any]]:
    """Three steps of two ranks with two samples each: in the second, rank 1 has no region, in the third, rank 0."""
    rows = captioned(name, [sample_of(number) for number in range(12)])
    return [row | {"regions": []} if number in (6, 7, 8, 9) else row for number, row in enumerate(rows)]


def metrics_of(trainer: Any) -> dict[str, float]:
    """Means of the losses since the last logging."""
    logs = {"loss": 0.0}
    trainer.log(logs)
    return logs
