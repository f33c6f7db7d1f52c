"""DINOv3's vision transformers (facebook/dinov3-vit...). Positions are rotations, so any image side will do.

transformers has their image processor for torchvision alone, which has to be installed; it squeezes images to a square.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import DINOv3ViTConfig, DINOv3ViTModel

from llava.model.multimodal_encoder.vision_tower import VisionTower


class Dinov3VisionTower(VisionTower):
    """`VisionTower` over `DINOv3ViTModel`: CLS and register tokens before the patches."""

    model_class = DINOv3ViTModel
    config_class = DINOv3ViTConfig
    has_position_table = False

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False):
        if find_spec("torchvision") is None:
            raise ImportError(
                f"{vision_tower}: the image processor of DINOv3 needs torchvision, which isn't installed. Install it "
                "with: pip install 'patch-aligned-llava[dinov3]'"
            )
        super().__init__(vision_tower, args, delay_load)
