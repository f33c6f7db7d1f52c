"""CLIP's vision transformer, the tower of LLaVA-1.5 (openai/clip-vit-large-patch14-336)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.multimodal_encoder.vision_tower import VisionTower


class CLIPVisionTower(VisionTower):
    """`VisionTower` over `CLIPVisionModel`."""

    model_class = CLIPVisionModel
    config_class = CLIPVisionConfig

    def load_model(self, device_map: Any = None) -> None:
        """Reads the weights; a second call does nothing."""
        already_loaded = self.is_loaded
        super().load_model(device_map)
        if not already_loaded:
            self.register_load_state_dict_pre_hook(drop_nested_prefix)

    def checkpoint_name(self, name: str) -> str:
        """Checkpoints keep the names of transformers 4, which nested the encoder in a `vision_model`."""
        return name.replace(FLAT, NESTED) if FLAT in name and NESTED not in name else name


FLAT, NESTED = "vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model."


def drop_nested_prefix(module: CLIPVisionTower, state_dict: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """Lets `load_state_dict` read the names that checkpoints use."""
    nested, flat = prefix + "vision_tower.vision_model.", prefix + "vision_tower."
    for name in [name for name in state_dict if name.startswith(nested)]:
        state_dict[flat + name.removeprefix(nested)] = state_dict.pop(name)
