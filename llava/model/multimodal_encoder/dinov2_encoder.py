"""DINOv2, the tower of the miniature world. Its position table is interpolated to any image side."""

from __future__ import annotations

from transformers import Dinov2Config, Dinov2Model

from llava.model.multimodal_encoder.vision_tower import VisionTower


class Dinov2VisionTower(VisionTower):
    """`VisionTower` over `Dinov2Model`, at the side that the image processor crops to."""

    model_class = Dinov2Model
    config_class = Dinov2Config

    @property
    def image_side(self) -> int:
        """Side of the square model image, in pixels: the processor's crop, not the side of pretraining (518)."""
        return self.image_processor.crop_size["height"]
