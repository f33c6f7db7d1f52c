"""Tiny vision towers with random weights, as folders that `--vision_tower` can name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
REGISTERS = {"num_register_tokens": 4}


def tiny_encoder(kind: str) -> tuple[PreTrainedModel, int]:
    """An encoder, and the side of the images it is to see."""
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**SIZE, image_size=56, patch_size=14)), 56
    if kind == "siglip":  # 3 patches of 14 pixels leave 6 unseen, as 27 do in 384
        return SiglipVisionModel(SiglipVisionConfig(**SIZE, image_size=48, patch_size=14)), 48
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**SIZE, image_size=70, patch_size=14)), 56
    if kind == "dinov2_with_registers":
        config = Dinov2WithRegistersConfig(**SIZE, **REGISTERS, image_size=70, patch_size=14)
        return Dinov2WithRegistersModel(config), 56
    return DINOv3ViTModel(DINOv3ViTConfig(**SIZE, **REGISTERS, image_size=32, patch_size=16)), 64


@pytest.fixture
def tower_folder(tmp_path: Path) -> Callable[[str], str]:
    """Writes a tiny tower of one of `clip`, `siglip`, `dinov2`, `dinov2_with_registers`, `dinov3`; gives its folder."""

    def write(kind: str) -> str:
        torch.manual_seed(0)
        encoder, side = tiny_encoder(kind)
        square = {"height": side, "width": side}
        processor = {
            "siglip": lambda: SiglipImageProcessorPil(size=square),
            "dinov3": lambda: DINOv3ViTImageProcessor(size=square),
        }.get(kind, lambda: CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square))()
        folder = tmp_path / kind
        encoder.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return write
