"""Families of transformers whose projectors can be measured: one class each, chosen by the config's `model_type`.

A family says how its images are made square, which features its projector reads, and where that projector is. What is
asked of it: one projected token for each cell of a square grid over the image.
"""

from __future__ import annotations

import copy
import json
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
from llava.mm_utils import image_geometry_of
from patch_aligned.models.llava import MeasuredProjector, Tower, WordEmbeddings, without_normalisation


def family_of(path: Path) -> type[TransformersTower] | None:
    """The tower class for a checkpoint's folder; None if it is no folder of transformers, such as LLaVA's own.

    Raises:
        ValueError: it is a model of transformers, but of no known family, or its config.json is broken.
    """
    file = path / "config.json"
    if not file.is_file():
        return None
    config = read_config(file)
    if "text_config" not in config:  # LLaVA's own configs may call themselves `llava` too, but have no parts
        return None
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{path}: config.json says model_type {model_type!r}; expected one of {', '.join(FAMILIES)}. "
            "Another family is one class and one line in patch_aligned/models/transformers.py."
        )
    return FAMILIES[model_type]


def read_config(file: Path) -> dict[str, Any]:
    """What a checkpoint's config.json says.

    Raises:
        ValueError: it is broken.
    """
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: found no JSON ({error}); expected a checkpoint's config. Copy it anew.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: found a {type(config).__name__}; expected a checkpoint's config. Copy it anew.")
    return config


def load_family(name: str, path: Path, device: str = "cpu") -> tuple[Tower, MeasuredProjector]:
    """A model's tower and projector with its word embeddings; the layers of its LLM are neither built nor read.

    Args:
        name: of the projector in tables.
        path: the checkpoint's folder, for which `family_of` names a class.
        device: where tower and projector run, in float32.

    Raises:
        ValueError: the family is unknown, or the checkpoint lacks a part.
    """
    family = family_of(path)
    if family is None:
        raise ValueError(f"{path}: found no folder of a model of transformers; expected one with a config.json.")
    tower = family(path, device)
    return tower, tower.measured_projector(name)


# What all families of transformers share: loading the parts up to the projector, and the geometry of their images.


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


# LLaVA as Hugging Face publishes it: `LlavaForConditionalGeneration`.


class LlavaTower(TransformersTower):
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


# LLaVA-NeXT (`LlavaNextForConditionalGeneration`): its base tile, the whole image squeezed to a square.


class LlavaNextTower(LlavaTower):
    """As LLaVA's, but for the image: of its tiles the first is the base."""

    def geometry(self, original_wh: tuple[int, int], grid: tuple[int, int]) -> ImageGeometry:
        """The whole image squeezed to the square."""
        return TransformersTower.geometry(self, original_wh, grid)


# PaliGemma and PaliGemma 2 (`PaliGemmaForConditionalGeneration`): SigLIP and one linear layer.


class PaliGemmaTower(TransformersTower):
    """SigLIP on the image squeezed to a square.

    The model divides the visual tokens and multiplies the words by the root of its width; neither changes a cosine or
    an entropy, so both are left as they are stored.
    """

    projector_path = "multi_modal_projector"

    def selected_features(self, pixels: Tensor) -> Tensor:
        """The last layer: `[B, S, d]`."""
        return self.model.vision_tower(pixels).last_hidden_state


# Idefics3 and SmolVLM (`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`), on the whole image.


class Idefics3Tower(TransformersTower):
    """SigLIP, whose patches the projector joins in blocks, so that a token covers several patches each way.

    These models also cut an image into tiles; measured is the whole image squeezed to one tile, which they see as well.
    """

    projector_path = "connector"
    processor_options = {"do_image_splitting": False, "do_pad": False}  # noqa: RUF012  # read only

    def selected_features(self, pixels: Tensor) -> Tensor:
        """The last layer: `[B, S, d]`."""
        return self.model.vision_model(pixel_values=pixels).last_hidden_state


FAMILIES: dict[str, type[TransformersTower]] = {
    "llava": LlavaTower,
    "llava_next": LlavaNextTower,
    "paligemma": PaliGemmaTower,
    "idefics3": Idefics3Tower,
    "smolvlm": Idefics3Tower,
}
"""The class of each `model_type`."""
