"""Choose the class of a vision tower by the model type of its folder or hub repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from llava.model.multimodal_encoder.clip_encoder import (
    CLIPVisionTower,
    Dinov2VisionTower,
    Dinov2WithRegistersVisionTower,
    Dinov3VisionTower,
    SiglipVisionTower,
)
from llava.model.multimodal_encoder.vision_tower import VisionTower

TOWER_OF_MODEL_TYPE: dict[str, type[VisionTower]] = {
    "clip": CLIPVisionTower,
    "clip_vision_model": CLIPVisionTower,
    "siglip": SiglipVisionTower,
    "siglip_vision_model": SiglipVisionTower,
    "dinov2": Dinov2VisionTower,
    "dinov2_with_registers": Dinov2WithRegistersVisionTower,
    "dinov3_vit": Dinov3VisionTower,
}
"""Model types of transformers. SigLIP 2's models of fixed resolution are of type `siglip`, too."""
NOT_SUPPORTED = {
    "siglip2": "a SigLIP 2 model of variable resolution (naflex), which has no square grid of patches",
    "dinov3_convnext": "a convolutional DINOv3, whose hidden layers are not patches of one size",
}
NOT_SUPPORTED["siglip2_vision_model"] = NOT_SUPPORTED["siglip2"]


def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> VisionTower:
    """Builds the tower that `mm_vision_tower` (or `vision_tower`) names.

    Args:
        vision_tower_cfg: model config or training arguments.
        **kwargs: passed to the tower, e.g. `delay_load=True`.

    Raises:
        ValueError: no tower is named, it cannot be found, or its kind is not supported.
    """
    name = getattr(vision_tower_cfg, "mm_vision_tower", None) or getattr(vision_tower_cfg, "vision_tower", None)
    if not name:
        raise ValueError("No vision tower is named: pass --vision_tower NAME or set `mm_vision_tower` in config.json.")
    if getattr(vision_tower_cfg, "s2", False):
        raise ValueError(
            "The config asks for a tower at several scales (`s2`), which is not supported. Set `s2` to false."
        )
    try:
        model_type = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        where = "It is not a folder here" if not Path(name).exists() else "The folder holds no readable config.json"
        raise ValueError(
            f"Unknown vision tower: {name}. {where}, and the hub gave: {str(error).splitlines()[0]} "
            "Pass --vision_tower a local folder or a hub name such as openai/clip-vit-large-patch14-336."
        ) from error
    if model_type not in TOWER_OF_MODEL_TYPE:
        raise ValueError(
            f"Unknown vision tower: {name} is {NOT_SUPPORTED.get(model_type, f'of model type `{model_type}`')}. "
            f"Supported: {', '.join(TOWER_OF_MODEL_TYPE)}."
        )
    return TOWER_OF_MODEL_TYPE[model_type](name, args=vision_tower_cfg, **kwargs)
