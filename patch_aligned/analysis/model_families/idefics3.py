"""Idefics3 and SmolVLM (`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`), on the whole image."""

from __future__ import annotations

from torch import Tensor

from patch_aligned.analysis.model_families.transformers_tower import TransformersTower


class FamilyTower(TransformersTower):
    """SigLIP, whose patches the projector joins in blocks, so that a token covers several patches each way.

    These models also cut an image into tiles; measured is the whole image squeezed to one tile, which they see as well.
    """

    projector_path = "connector"
    processor_options = {"do_image_splitting": False, "do_pad": False}  # noqa: RUF012  # read only

    def selected_features(self, pixels: Tensor) -> Tensor:
        """The last layer: `[B, S, d]`."""
        return self.model.vision_model(pixel_values=pixels).last_hidden_state
