"""`models.base` for models of transformers. Each family is an entry of the registry `FAMILIES`.

The measured input is the full image as one square: squeezed, cropped or padded. Tiles of the image, which some models
add, are not measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.utils import logging as transformers_logging

from patch_aligned.cells import Layout, square_grid
from patch_aligned.models.base import VisionLanguageModel
from patch_aligned.models.llava import ImageView, image_view_of, layout_of, load_words, read_config


def _last_layer(model: Any, pixels: Tensor) -> Tensor:
    return model.get_submodule("vision_tower" if hasattr(model, "vision_tower") else "vision_model")(
        pixel_values=pixels
    ).last_hidden_state


def _chosen_layers(model: Any, pixels: Tensor) -> Tensor:
    """Concatenate the chosen hidden layers, without CLS if the config drops it: `[B, S, d]`."""
    layers = model.config.vision_feature_layer
    hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    first = 1 if model.config.vision_feature_select_strategy == "default" else 0
    chosen = [layers] if isinstance(layers, int) else layers
    return torch.cat([hidden[layer][:, first:] for layer in chosen], dim=-1)


@dataclass(frozen=True)
class Family:
    """What is specific to the models of one `model_type`.

    Attributes:
        projector: name of the projector's module in the model.
        features: computes the projector's input `[B, S, d]` from the model and pixels `[B, 3, side, side]`.
        squeezes: whether images are squeezed to a square; otherwise the image processor's settings decide.
        processor_options: options of the image processor, such as not to split an image into tiles.
    """

    projector: str
    features: Callable[[Any, Tensor], Tensor]
    squeezes: bool = True
    processor_options: Mapping[str, Any] = field(default_factory=dict)


_WHOLE_IMAGE = {"do_image_splitting": False, "do_pad": False}
FAMILIES: dict[str, Family] = {
    "llava": Family("multi_modal_projector", _chosen_layers, squeezes=False),
    "llava_next": Family("multi_modal_projector", _chosen_layers),  # the first of its tiles is the base tile
    # PaliGemma scales word embeddings by the square root of its width, which changes neither cosines nor entropies.
    "paligemma": Family("multi_modal_projector", _last_layer),
    # The connector merges blocks of patches, so a token covers several patches in each direction.
    "idefics3": Family("connector", _last_layer, processor_options=_WHOLE_IMAGE),
    "smolvlm": Family("connector", _last_layer, processor_options=_WHOLE_IMAGE),
}
"""Registry of supported families, by `model_type` of the config."""


def family_of(path: Path) -> Family | None:
    """Return the family of a checkpoint folder, or None if it is not a model of transformers (such as LLaVA's own).

    Raises:
        ValueError: it is a model of transformers of an unknown family, or its config.json is broken.
    """
    file = path / "config.json"
    if not file.is_file():
        return None
    config = read_config(file)
    if "text_config" not in config:  # LLaVA's own configs may have model_type `llava` too, but no nested configs
        return None
    model_type = config.get("model_type", "")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{path}: config.json says model_type {model_type!r}; expected one of {', '.join(FAMILIES)}. "
            "To add a family, extend FAMILIES in patch_aligned/models/transformers.py."
        )
    return FAMILIES[model_type]


def load_family(name: str, path: Path, device: str = "cpu") -> VisionLanguageModel:
    """Load a model up to its projector, and its word embeddings. The layers of its LLM are not loaded.

    Args:
        name: name of the projector in tables.
        path: folder of a checkpoint of one of `FAMILIES`.
        device: device of tower and projector, which run in float32.

    Raises:
        ValueError: the family is unknown, or weights are missing.
    """
    family = family_of(path)
    if family is None:
        raise ValueError(f"{path}: found no model of transformers; expected a folder whose config.json has text_config")
    encoder = TransformersEncoder(path, family, device)
    projector = encoder.model.get_submodule(family.projector)
    words = load_words(str(path), placeholder=encoder.config.image_token_id)

    def untrained() -> nn.Module:
        return type(projector)(encoder.config)

    modules = (f"model.{family.projector}",)
    return VisionLanguageModel(name, str(path), encoder, projector, words, untrained, modules)


class TransformersEncoder:
    """A model of transformers up to its projector.

    Args:
        path: folder of the checkpoint.
        family: its family.
        device: device of the model, which runs in float32.

    Raises:
        ValueError: weights of the tower or the projector are missing.
    """

    def __init__(self, path: Path, family: Family, device: str = "cpu"):
        self.name, self.device, self._family = str(path), device, family
        config = AutoConfig.from_pretrained(path)
        self.config = copy.deepcopy(config)
        self.model: Any = _without_language_layers(path, config).to(device)
        self.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")  # as in LLaVA
        # Not the config's image_size, which is that of the tower's pretraining: DINOv2 accepts any size.
        self._side = self.inputs([Image.new("RGB", (64, 64))]).shape[-1]

    @property
    def width(self) -> int:
        """d, the width of the features, summed over the chosen layers."""
        layers = getattr(self.config, "vision_feature_layer", 0)
        return self.config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))

    @property
    def image_aspect_ratio(self) -> str:
        """How images are made square: LLaVA's `square` (crop) or `pad`, or `squeeze`."""
        if self._family.squeezes:
            return "squeeze"
        treatment = self._view((self._side, self._side), (1, 1)).treatment
        return "square" if treatment == "crop" else treatment

    def inputs(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocess RGB images for the tower: `[B, 3, side, side]`. Of several tiles, the first is used."""
        stacked = []
        for image in images:
            values = self.image_processor(image, return_tensors="pt", **self._family.processor_options)["pixel_values"]
            stacked.append(values.reshape(-1, *values.shape[-3:])[0])  # [1, (tiles,) 3, side, side] -> [3, side, side]
        return torch.stack(stacked)

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """Compute features before the projector: `[B, 3, side, side]` -> `[B, S, d]`, float32."""
        return self._family.features(self.model, inputs.to(self.device, torch.float32))

    def layout(self, image_wh: tuple[int, int], shape: tuple[int, int]) -> Layout:
        """Return the layout of `shape` (rows, cols) visual tokens over an image of this size."""
        if not self._family.squeezes:
            return layout_of(self._view(image_wh, shape))
        grid = square_grid(image_wh, "squeeze", shape, self._side, self._side, self._seen_side)
        return Layout((grid,), grid.rows * grid.cols)

    def _view(self, image_wh: tuple[int, int], shape: tuple[int, int]) -> ImageView:
        """Describe the image processor's treatment: padding, centre crop or squeezing."""
        ratio = "pad" if getattr(self.image_processor, "do_pad", False) else "square"
        return image_view_of(image_wh, self.image_processor, ratio, shape, self._seen_side)

    @property
    def _seen_side(self) -> int:
        """Side of the area that patches cover, in pixels. The rest of the processor's output is not seen."""
        patch = self.config.vision_config.patch_size
        return self._side // patch * patch


def _without_language_layers(path: Path, config: Any) -> nn.Module:
    text_config = config.get_text_config()
    text_config.num_hidden_layers = 0
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = []
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # else it lists all layers that are skipped on purpose
    try:
        model, report = AutoModel.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{path}: the checkpoint lacks {len(missing)} weights of a {config.model_type}, such as {missing[0]!r}, so "
            "the tower or projector is incomplete. Pass the folder of a complete model."
        )
    return model.eval()
