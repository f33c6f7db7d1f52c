"""SigLIP and the SigLIP 2 models of fixed resolution (google/siglip-so400m-patch14-384, google/siglip2-...).

Their image processor squeezes images to a square, whatever their shape; `--image_aspect_ratio pad` keeps the shape.
"""

from __future__ import annotations

from transformers import SiglipVisionConfig, SiglipVisionModel

from llava.model.multimodal_encoder.vision_tower import VisionTower


class SiglipVisionTower(VisionTower):
    """`VisionTower` over `SiglipVisionModel`, which has patches alone and no CLS token."""

    model_class = SiglipVisionModel
    config_class = SiglipVisionConfig
    has_cls = False
    was_nested = True
