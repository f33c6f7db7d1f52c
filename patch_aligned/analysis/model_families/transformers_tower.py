"""What all families of transformers share: loading the parts up to the projector, and the geometry of their images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.utils import logging as transformers_logging

from llava.image_geometry import ImageGeometry
from patch_aligned.analysis.embeddings import MeasuredProjector, WordEmbeddings, without_normalisation


class TransformersTower:
    """A model of transformers up to its projector; a family fills in what is its own.

    Args:
        path: the checkpoint's folder.
        device: where the model runs, in float32.

    Raises:
        ValueError: weights of the tower or the projector are missing.
    """

    projector_path: str
    """Name of the projector's module in the model."""
    processor_options: Mapping[str, Any] = {}
    """Options of the image processor, such as to leave an image whole."""

    def __init__(self, path: Path, device: str = "cpu"):
        self.name, self.device = str(path), device
        config = AutoConfig.from_pretrained(path)
        self.config = copy.deepcopy(config)
        self.model: Any = _without_language_layers(path, config).to(device)
        self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")  # as LLaVA's own
        # Not the config's image_size, which is the tower's at its own training: DINOv2 takes any.
        self.side = self.pixels(Image.new("RGB", (64, 64))).shape[-1]

    def measured_projector(self, name: str) -> MeasuredProjector:
        """The projector with its own word embeddings."""
        projector = self.model.get_submodule(self.projector_path)

        def untrained() -> nn.Module:
            return type(projector)(self.config)

        words = WordEmbeddings.load(self.name, placeholder=self.config.image_token_id)
        return MeasuredProjector(name, self.name, projector, words, untrained)

    @property
    def width(self) -> int:
        """d, the width of the features."""
        return self.config.vision_config.hidden_size

    def pixels(self, image: Image.Image) -> Tensor:
        """One image as the tower sees it, `[3, side, side]`; of several tiles the first."""
        values = self.image_processor(image, return_tensors="pt", **self.processor_options)["pixel_values"]
        return values.reshape(-1, *values.shape[-3:])[0]  # [1, (tiles,) 3, side, side] -> [3, side, side]

    def displayed(self, pixels: Tensor) -> Tensor:
        """The same for a picture, values 0..1, without what no patch covers."""
        return without_normalisation(pixels, self.image_processor, self.seen_side)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Features before the projector: `[B, 3, side, side]` -> `[B, S, d]`, float32."""
        return self.selected_features(pixels.to(self.device, torch.float32))

    def selected_features(self, pixels: Tensor) -> Tensor:
        """What the family's projector reads, `[B, S, d]`."""
        raise NotImplementedError

    def geometry(self, original_wh: tuple[int, int], grid: tuple[int, int]) -> ImageGeometry:
        """What `pixels` does to an image of this size: here, squeezing it to the square."""
        geometry = ImageGeometry(original_wh, self.seen_side, "squeeze", grid)
        return geometry if geometry.side == self.side else replace(geometry, processed_side=self.side)

    @property
    def image_aspect_ratio(self) -> str:
        """What `geometry` does in LLaVA's words: `square` crops, `pad` pads; `squeeze`, which LLaVA has no word for."""
        mode = self.geometry((self.side, self.side), (1, 1)).mode
        return "square" if mode == "crop" else mode

    @property
    def seen_side(self) -> int:
        """Width and height of what the patches cover, pixels; the rest of `side` is not seen."""
        patch = self.config.vision_config.patch_size
        return self.side // patch * patch


def _without_language_layers(path: Path, config: Any) -> nn.Module:
    text_config = config.get_text_config()
    text_config.num_hidden_layers = 0
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = []
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # or it lists all layers that are left out on purpose
    try:
        model, report = AutoModel.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{path}: the checkpoint lacks {len(missing)} weights that a {config.model_type} has, such as "
            f"{missing[0]!r}, so tower or projector are not whole. Pass the folder of a complete model."
        )
    return model.eval()
