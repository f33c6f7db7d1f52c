"""LLaVA-NeXT (`LlavaNextForConditionalGeneration`): its base tile, the whole image squeezed to a square."""

from __future__ import annotations

from llava.image_geometry import ImageGeometry
from patch_aligned.analysis.model_families import llava_hf
from patch_aligned.analysis.model_families.transformers_tower import TransformersTower


class FamilyTower(llava_hf.FamilyTower):
    """As LLaVA's, but for the image: of its tiles the first is the base."""

    def geometry(self, original_wh: tuple[int, int], grid: tuple[int, int]) -> ImageGeometry:
        """The whole image squeezed to the square."""
        return TransformersTower.geometry(self, original_wh, grid)
