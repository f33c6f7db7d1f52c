"""A picture of a plugin run's first batch, so that a wrong geometry is seen before hours are spent on it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llava.train.llava_trainer import LLaVATrainer

logger = logging.getLogger(__name__)

FIRST_BATCH = "first_batch"


def undo_normalisation(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Images `[N, 3, H, W]` as the tower takes them, back in 0..1."""
    shift, scale = (torch.tensor(channel, dtype=torch.float32).view(1, 3, 1, 1) for channel in (mean, std))
    return (images.detach().float().cpu() * scale + shift).clamp(0, 1)


def save_first_batch(trainer: LLaVATrainer, inputs: dict[str, Any]) -> None:
    """Hands the first micro-batch of the first rank to the plugin's `describe_first_batch`.

    Of tiled images (anyres) the base tile is shown. Nothing is drawn for a batch without images.
    """
    images = inputs.get("images")
    if trainer.plugin is None or not trainer.args.should_save or images is None:
        return
    images = torch.stack([image if image.dim() == 3 else image[0] for image in images])  # [N, 3, H, W]
    processor = trainer.model.get_vision_tower().image_processor
    path = Path(trainer.args.output_dir) / FIRST_BATCH
    pixels = undo_normalisation(images, processor.image_mean, processor.image_std)
    trainer.plugin.describe_first_batch(pixels, inputs.get("plugin_batch") or {}, path)
    logger.info("The first batch as the plugin sees it: %s.*", path)
