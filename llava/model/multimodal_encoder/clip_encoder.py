"""CLIP's vision transformer, the tower of LLaVA-1.5 (openai/clip-vit-large-patch14-336)."""

from __future__ import annotations

from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.multimodal_encoder.vision_tower import VisionTower


class CLIPVisionTower(VisionTower):
    """`VisionTower` over `CLIPVisionModel`."""

    model_class = CLIPVisionModel
    config_class = CLIPVisionConfig
    was_nested = True
