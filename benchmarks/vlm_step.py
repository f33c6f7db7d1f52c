"""What the patch loss costs in a training step of any vision-language model: its hook and its collator.

    python benchmarks/vlm_step.py                    # on the CPU: a tiny model whose LLM waits for 100 ms
    python benchmarks/vlm_step.py --shape 2b --device cuda

The share comes first: time in the hook (forward and backward) and in the collator, over the time of the step. The model
is an Idefics3, which sees an image in tiles and as a whole, with random weights; `2b` is about the shape of SmolVLM. On
the CPU the least time of the processor counts, so that other programs do not, and the wait is added to it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from mask_tokens import blob_masks
from measured_models import byte_tokenizer, to_device
from measuring import command_line, median_seconds, times_of
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    Trainer,
    TrainingArguments,
)

from patch_aligned import PatchAlignment, train_projector_only
from patch_aligned.masks import rle_of_mask
from patch_aligned.models.tiny import tiny_copy

WAIT_SECONDS = 0.1
IMAGE_WH, REGIONS = (640, 480), 4  # as in PAD
LABELS = ("dog", "traffic light", "grass", "wooden table", "sky", "window")
Shape = Literal["tiny", "2b"]


class Wait(nn.Module):
    """Stands for the layers of an LLM."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Wait, and change nothing."""
        time.sleep(WAIT_SECONDS)
        return hidden_states


class Steps(NamedTuple):
    """What is timed: a step of captions alone, one with the patch loss, and what the loss adds to it."""

    captions: Callable[[], object]
    aligned: Callable[[], object]
    hook: Callable[[], object]
    collator: Callable[[], object]
    visual_tokens: int


def model_and_processor(shape: Shape, device: str) -> tuple[Any, Any]:
    """Random weights, of which the projector is trained, in bfloat16 on a GPU; tiles of 81 tokens, or of 16."""
    tile, merged = (112, 2) if shape == "tiny" else (384, 3)
    tokenizer = byte_tokenizer(512 if shape == "tiny" else 49155)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 4 * tile}, max_image_size={"longest_edge": tile})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=(tile // 14 // merged) ** 2)
    vision = {"image_size": tile, "patch_size": 14, "num_hidden_layers": 27, "intermediate_size": 4304}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 2048, "num_hidden_layers": 24,
            "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 8192}  # fmt: skip
    config = Idefics3Config(
        image_token_id=processor.image_token_id, vision_config=vision, text_config=text, scale_factor=merged
    )
    if shape == "tiny":
        model: Any = tiny_copy(config, auto_class=AutoModelForImageTextToText)
        model.get_decoder().layers = nn.ModuleList([Wait()])
    else:
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    train_projector_only(model)
    return model.train(), processor


def samples_of(count: int) -> list[dict[str, Any]]:
    """Images of noise with ragged regions."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, *IMAGE_WH[::-1], 3), dtype=np.uint8)
    masks = [map(rle_of_mask, blob_masks(REGIONS, IMAGE_WH, random)) for _ in range(count)]
    regions = [[{"tag": random.choice(LABELS), "rle_mask": mask} for mask in of_image] for of_image in masks]
    return [
        {"images": [Image.fromarray(image)], "regions": of_image}
        for image, of_image in zip(pixels, regions, strict=True)
    ]


def steps_of(shape: Shape, device: str, count: int) -> Steps:
    """Make the steps of a batch of `count` images."""
    model, processor = model_and_processor(shape, device)
    samples = samples_of(count)

    def collate(samples: Sequence[dict[str, Any]]) -> Any:
        texts, images = [f"{processor.image_token} A picture of what is in it."] * count, [s["images"] for s in samples]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, use_cpu=device == "cpu", bf16=False, report_to="none", max_steps=1,
                                 remove_unused_columns=False)  # fmt: skip
        trainer: Any = Trainer(model, args, collate, samples, processing_class=processor)
        own_loss = trainer.compute_loss
        PatchAlignment("regions", beta=(5, 5)).attach(trainer)
        collator = trainer.data_collator
        batch = collator(samples)  # draws the first batch

    plain = {name: value for name, value in batch.items() if name != "patch_targets"}
    collator.collator = lambda samples: dict(plain)  # what the patch loss adds to it is left
    batch = to_device(batch, device)
    inputs, targets, embed = to_device(plain, device), batch["patch_targets"], model.get_input_embeddings()
    is_visual = inputs["input_ids"] == processor.image_token_id
    embeddings = embed(inputs["input_ids"]).detach().requires_grad_()  # [B, L, D]

    def hook() -> None:
        collator.objective.loss(embeddings[is_visual], targets["image_row"], targets, embed)[0].backward()

    def step(compute_loss: Callable[..., Any], batch: dict[str, Any]) -> None:
        compute_loss(model, dict(batch)).backward()
        model.zero_grad()

    return Steps(
        lambda: step(own_loss, inputs),
        lambda: step(trainer.compute_loss, batch),
        hook,
        lambda: collator(samples),
        int(is_visual.sum()),
    )


def seconds_of(action: Callable[[], object], repeats: int, device: str, waits: bool = False) -> float:
    """Median time of an action; on the CPU the least time of the processor, and the wait if there is one in it."""
    if device != "cpu":
        return median_seconds(action, repeats, device)
    return min(times_of(action, repeats, time.process_time)) + waits * WAIT_SECONDS


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the share, then the times that it comes from."""
    parser = command_line(__doc__)
    parser.add_argument("--shape", choices=("tiny", "2b"), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args(arguments)

    steps, waits = steps_of(args.shape, args.device, args.batch_size), args.shape == "tiny"
    step = seconds_of(steps.aligned, args.repeats, args.device, waits)
    captions = seconds_of(steps.captions, args.repeats, args.device, waits)
    hook = seconds_of(steps.hook, args.repeats, args.device)
    collator = seconds_of(steps.collator, args.repeats, "cpu")
    print(f"{(hook + collator) / step:.2%} of a step in hook and collator: {hook / step:.2%} and {collator / step:.2%}")
    print(f"{step / captions:.4f}x the time of a step without the patch loss, the collators aside")
    print(
        f"ms: step {step * 1e3:.1f}, hook {hook * 1e3:.2f}, collator {collator * 1e3:.2f}; {args.batch_size} images of "
        f"{REGIONS} regions, {steps.visual_tokens} visual tokens"
    )


if __name__ == "__main__":
    main()
