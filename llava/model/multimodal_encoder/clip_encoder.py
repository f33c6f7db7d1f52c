"""CLIP's vision transformer, the tower of LLaVA-1.5 (openai/clip-vit-large-patch14-336)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import CLIPVisionModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, SiglipVisionModel

from llava.model.multimodal_encoder.vision_tower import VisionTower


class CLIPVisionTower(VisionTower):
    """`VisionTower` over `CLIPVisionModel`."""

    model_class = CLIPVisionModel
    was_nested = True


# SigLIP and the SigLIP 2 models of fixed resolution (google/siglip-so400m-patch14-384, google/siglip2-...).
#
# Their image processor squeezes images to a square, whatever their shape; `--image_aspect_ratio pad` keeps the shape.


class SiglipVisionTower(VisionTower):
    """`VisionTower` over `SiglipVisionModel`, which has patches alone and no CLS token."""

    model_class = SiglipVisionModel
    has_cls = False
    was_nested = True


# DINOv2, without and with registers. Its position table is interpolated to any image side.


class Dinov2VisionTower(VisionTower):
    """`VisionTower` over `Dinov2Model`, the tower of the miniature world."""

    model_class = Dinov2Model
    has_position_table = False  # the processor's crop, 224 pixels, is not the side of pretraining, 518


class Dinov2WithRegistersVisionTower(VisionTower):
    """`VisionTower` over `Dinov2WithRegistersModel`."""

    model_class = Dinov2WithRegistersModel
    has_position_table = False


# DINOv3's vision transformers (facebook/dinov3-vit...). Positions are rotations, so any image side will do.
#
# transformers has their image processor for torchvision alone, which has to be installed; it squeezes images to a
# square.


class Dinov3VisionTower(VisionTower):
    """`VisionTower` over `DINOv3ViTModel`: CLS and register tokens before the patches."""

    model_class = DINOv3ViTModel
    has_position_table = False

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False):
        if find_spec("torchvision") is None:
            raise ImportError(
                f"{vision_tower}: the image processor of DINOv3 needs torchvision, which isn't installed. Install it "
                "with: pip install 'patch-aligned-llava[dinov3]'"
            )
        super().__init__(vision_tower, args, delay_load)
