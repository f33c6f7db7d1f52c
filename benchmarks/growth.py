"""How the time of a step of stage 1 grows with batch, visual tokens, images and regions, for `run_all.py`.

Random weights in float32 at SmolLM2's width, with two layers in the LLM: what grows is the same with thirty.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured_models import random_batch, random_model
from measuring import median_seconds
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from patch_aligned.loss import patch_loss, region_cosines, region_embeddings

Points = list[tuple[int, float]]
SHAPE, PATCH = "smollm2_six_layers", 14


def step_of(batch_size: int = 2, side_px: int = 336, images: int = 1, *, is_tiny: bool) -> Callable[[], None]:
    """Forward and backward of the projector."""
    shape: Any = "tiny" if is_tiny else SHAPE
    model = random_model(shape, "cpu", tower_side_px=56 if is_tiny else side_px, num_hidden_layers=2).float()
    model.requires_grad_(False).train()
    model.get_model().mm_projector.requires_grad_(True)
    batch = random_batch(model, batch_size, text_tokens=21 + images, prompt_tokens=1 + images)
    batch["input_ids"][:, 1 : 1 + images] = IMAGE_TOKEN_INDEX
    batch["labels"][:, : 1 + images] = IGNORE_INDEX
    batch["images"] = batch["images"].float().repeat(images, 1, 1, 1)

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    return step


def patch_loss_of(regions: int, *, is_tiny: bool) -> Callable[[], None]:
    """The patch loss of 8 images with its gradients."""
    visual, width, images = (16, 64, 2) if is_tiny else (576, 576, 8)
    tokens = torch.randn(images, visual, width, requires_grad=True)  # [N, S, D]
    image_of = torch.arange(images).repeat_interleave(regions)  # [R]
    covered = torch.rand(images * regions, visual) < 0.1  # [R, S]
    labels: Tensor = torch.randn(images * regions, width)  # [R, D]

    def step() -> None:
        means = region_embeddings(tokens, image_of, covered)
        patch_loss(region_cosines(means, labels), image_of, images).backward()

    return step


PANELS: dict[str, tuple[Callable[..., Callable[[], None]], str, tuple[int, ...]]] = {
    "images in the batch": (step_of, "batch_size", (1, 2, 4, 8)),
    "side of an image, in visual tokens": (step_of, "side_px", tuple(PATCH * side for side in (12, 18, 24, 30))),
    "images in a sample, batch 2": (step_of, "images", (1, 2, 3)),
    "regions of an image, patch loss alone": (patch_loss_of, "regions", (1, 4, 16, 64)),
}
"""What grows, in which argument of which function, over which values."""


def measure_growth(repeats: int, *, is_tiny: bool) -> dict[str, Points]:
    """Median seconds at each value of each panel."""
    torch.manual_seed(0)
    return {
        panel: [
            (value // (PATCH if argument == "side_px" else 1), median_seconds(
                make(**{argument: value}, is_tiny=is_tiny), repeats, "cpu"))
            for value in values[: 2 if is_tiny else None]
        ]
        for panel, (make, argument, values) in PANELS.items()
    }  # fmt: skip


def plot_growth(growth: dict[str, Points], path: Path) -> None:
    """Draw a panel for each."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(growth), figsize=(3.2 * len(growth), 2.8), layout="constrained")
    for axis, (panel, points) in zip(axes, growth.items(), strict=True):
        values, seconds = zip(*points, strict=True)
        axis.plot(values, seconds, marker="o")
        axis.set(xlabel=panel, xticks=values, ylim=(0, None))
    axes[0].set_ylabel("seconds a step")
    figure.savefig(path)
    plt.close(figure)
