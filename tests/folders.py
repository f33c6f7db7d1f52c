"""Folders of checkpoints that tests write and change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
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


def set_config(folder: str | Path, **values: Any) -> None:
    """Sets keys in a checkpoint's config.json."""
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def save_shards(weights: dict[str, Tensor], folder: Path, ending: str) -> None:
    """Writes weights as two files, `bin` or `safetensors`, with their index."""
    stem = "pytorch_model" if ending == "bin" else "model"
    weight_map = {}
    for number in (0, 1):
        file = f"{stem}-0000{number + 1}-of-00002.{ending}"
        tensors = {name: weights[name] for name in sorted(weights)[number::2]}
        if ending == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def save_tower(kind: str, folder: Path) -> str:
    """Writes a tiny tower of random weights: `clip`, `siglip`, `dinov2`, `dinov2_with_registers` or `dinov3`."""
    torch.manual_seed(0)
    encoder, side = _tiny_encoder(kind)
    square = {"height": side, "width": side}
    processor = {
        "siglip": lambda: SiglipImageProcessorPil(size=square),
        "dinov3": lambda: DINOv3ViTImageProcessor(size=square),
    }.get(kind, lambda: CLIPImageProcessorPil(size={"shortest_edge": side + 4}, crop_size=square))()
    encoder.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _tiny_encoder(kind: str) -> tuple[PreTrainedModel, int]:
    """An encoder, and the side of the images it is to see."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**size, image_size=56, patch_size=14)), 56
    if kind == "siglip":  # 3 patches of 14 pixels leave 6 unseen, as 27 do in 384
        return SiglipVisionModel(SiglipVisionConfig(**size, image_size=48, patch_size=14)), 48
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**size, image_size=70, patch_size=14)), 56
    size["num_register_tokens"] = 4
    if kind == "dinov2_with_registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**size, image_size=70, patch_size=14)), 56
    return DINOv3ViTModel(DINOv3ViTConfig(**size, image_size=32, patch_size=16)), 64
