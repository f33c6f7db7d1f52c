"""DINOv2, without and with registers. Its position table is interpolated to any image side."""

from __future__ import annotations

from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from llava.model.multimodal_encoder.vision_tower import VisionTower


class Dinov2VisionTower(VisionTower):
    """`VisionTower` over `Dinov2Model`, the tower of the miniature world."""

    model_class = Dinov2Model
    config_class = Dinov2Config
    has_position_table = False  # the processor's crop, 224 pixels, is not the side of pretraining, 518


class Dinov2WithRegistersVisionTower(VisionTower):
    """`VisionTower` over `Dinov2WithRegistersModel`."""

    model_class = Dinov2WithRegistersModel
    config_class = Dinov2WithRegistersConfig
    has_position_table = False
