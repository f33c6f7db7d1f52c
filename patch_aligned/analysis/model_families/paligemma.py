"""PaliGemma and PaliGemma 2 (`PaliGemmaForConditionalGeneration`): SigLIP and one linear layer."""

from __future__ import annotations

from torch import Tensor

from patch_aligned.analysis.model_families.transformers_tower import TransformersTower


class FamilyTower(TransformersTower):
    """SigLIP on the image squeezed to a square.

    The model divides the visual tokens and multiplies the words by the root of its width; neither changes a cosine or
    an entropy, so both are left as they are stored.
    """

    projector_path = "multi_modal_projector"

    def selected_features(self, pixels: Tensor) -> Tensor:
        """The last layer: `[B, S, d]`."""
        return self.model.vision_tower(pixels).last_hidden_state
