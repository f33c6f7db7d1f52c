"""LLaVA as Hugging Face publishes it: `LlavaForConditionalGeneration`."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.image_geometry import ImageGeometry
from llava.mm_utils import image_geometry_of
from patch_aligned.analysis.model_families.transformers_tower import TransformersTower


class FamilyTower(TransformersTower):
    """A CLIP-like tower, of which one hidden layer or several side by side go into an MLP."""

    projector_path = "multi_modal_projector"

    @property
    def width(self) -> int:
        """d, the width of the features, of all chosen layers together."""
        layers = self.config.vision_feature_layer
        return super().width * (1 if isinstance(layers, int) else len(layers))

    def selected_features(self, pixels: Tensor) -> Tensor:
        """The chosen hidden layers, without CLS where the config drops it: `[B, S, d]`."""
        layers = self.config.vision_feature_layer
        hidden = self.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        chosen = [layers] if isinstance(layers, int) else layers
        return torch.cat([hidden[layer][:, first:] for layer in chosen], dim=-1)

    def geometry(self, original_wh: tuple[int, int], grid: tuple[int, int]) -> ImageGeometry:
        """As the image processor says: padded to a square, cut out of the middle, or squeezed."""
        ratio = "pad" if getattr(self.image_processor, "do_pad", False) else "square"
        return image_geometry_of(original_wh, self.image_processor, ratio, grid, self.seen_side)
