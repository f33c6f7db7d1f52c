"""Base class of vision towers: the patch features of one hidden layer of a pretrained encoder.

Letters: B images, S patches, C width of the tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from llava.mm_utils import processed_side
from llava.model.weights import broken_files_named

FLAT, NESTED = "vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model."


class VisionTower(nn.Module):
    """A vision encoder with upstream's interface, frozen unless a run trains it; one subclass for each kind of encoder.

    A frozen tower stays in evaluation mode: some encoders (DINOv3) jitter their positions in training mode.

    Args:
        vision_tower: hub name or local folder of the encoder.
        args: read for `mm_vision_select_layer`, `mm_vision_select_feature` (`patch` drops the CLS token, `cls_patch`
            keeps it). Register tokens are always dropped.
        delay_load: read only the configuration now; `load_model` reads the weights.
    """

    model_class: Any
    """The encoder's class in transformers."""
    has_cls = True
    """Whether a CLS token stands before the patches."""
    has_position_table = True
    """Whether positions are a table for one image side only."""
    was_nested = False
    """Whether checkpoints, as transformers 4 wrote them, have the encoder's weights in a `vision_model`."""

    def __init__(self, vision_tower: str, args: Any, delay_load: bool = False):
        super().__init__()
        self.vision_tower_name = vision_tower
        self.select_layer: int = args.mm_vision_select_layer
        self.select_feature: str = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(
                f"Unexpected select feature: {self.select_feature}. "
                "Set --mm_vision_select_feature to `patch` (without the CLS token) or `cls_patch` (with it)."
            )
        if self.select_feature == "cls_patch" and not self.has_cls:
            raise ValueError(
                f"Unexpected select feature: cls_patch, but {vision_tower} has no CLS token. "
                "Set --mm_vision_select_feature to `patch`."
            )
        self.is_loaded = False
        self.cfg_only = self.model_class.config_class.from_pretrained(vision_tower)
        layers = self.cfg_only.num_hidden_layers  # their inputs and the last one's output may be selected
        if not (isinstance(self.select_layer, int) and -layers - 1 <= self.select_layer <= layers):
            raise ValueError(
                f"--mm_vision_select_layer: found {self.select_layer!r}, but {vision_tower} has {layers} layers; "
                f"expected a number from {-layers - 1} to {layers}. LLaVA-1.5 uses -2."
            )
        # The PIL processor gives the pixels that published checkpoints were trained on; torchvision's differ by up to
        # 0.16 after normalisation.
        self.image_processor = AutoImageProcessor.from_pretrained(vision_tower, backend="pil")
        if self.has_position_table and self.image_side != self.cfg_only.image_size:
            raise ValueError(
                f"{vision_tower}: the image processor gives {self.image_side} pixels (preprocessor_config.json), but "
                f"the encoder has positions for {self.cfg_only.image_size} (config.json). Make the two agree."
            )
        if not delay_load:
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Read the weights; a second call does nothing."""
        if self.is_loaded:
            return
        with broken_files_named(self.vision_tower_name):
            self.vision_tower = self.model_class.from_pretrained(self.vision_tower_name, device_map=device_map)
        self.vision_tower.requires_grad_(False)
        self.vision_tower.eval()
        self.is_loaded = True
        if self.was_nested:
            self.register_load_state_dict_pre_hook(drop_nested_prefix)

    def feature_select(self, image_forward_outs: Any) -> Tensor:
        """Return features of the selected layer: the patches `[B, S, C]`, or with CLS in front `[B, 1 + S, C]`."""
        features = image_forward_outs.hidden_states[self.select_layer]  # [B, CLS and registers + S, C]
        patches = features[:, self.tokens_in_front :]  # [B, S, C]
        return patches if self.select_feature == "patch" else torch.cat([features[:, :1], patches], dim=1)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Return features `[B, S, C]` of images `[B, 3, H, W]`, in the images' dtype; a list of images gives a list."""
        if isinstance(images, list):
            return [self.encode(image[None]).to(image.dtype) for image in images]
        return self.encode(images).to(images.dtype)

    def encode(self, images: Tensor) -> Tensor:
        """Return features `[B, S, C]` in the tower's dtype, with gradients only if the tower is trained."""
        if not self.is_loaded:
            raise ValueError(
                "The vision tower is not loaded: call model.get_vision_tower().load_model() and move it to the model's "
                "device, or load the model by llava.model.builder.load_pretrained_model."
            )
        with torch.set_grad_enabled(self.is_trained and torch.is_grad_enabled()):
            outputs = self.vision_tower(images.to(self.device, self.dtype), output_hidden_states=True)
            return self.feature_select(outputs)

    def train(self, mode: bool = True) -> VisionTower:
        """Switch to training mode, but only if the tower is trained."""
        return super().train(mode and self.is_loaded and self.is_trained)

    def checkpoint_name(self, name: str) -> str:
        """Return the name in checkpoints of the tensor that the model calls `name`."""
        return name.replace(FLAT, NESTED) if self.was_nested and FLAT in name and NESTED not in name else name

    @property
    def is_trained(self) -> bool:
        """Whether any weight of the tower is trained."""
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    @property
    def dummy_feature(self) -> Tensor:
        """A feature of zeros, `[1, C]`."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.vision_tower.device

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        """Width C of the features."""
        return self.config.hidden_size

    @property
    def tokens_in_front(self) -> int:
        """Tokens before the patches: CLS, and registers where the encoder has any."""
        return int(self.has_cls) + getattr(self.config, "num_register_tokens", 0)

    @property
    def image_side(self) -> int:
        """Side of the square model image, in pixels: what the image processor gives."""
        return processed_side(self.image_processor)

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the model image."""
        return self.image_side // self.config.patch_size

    @property
    def seen_side(self) -> int:
        """Pixels of the image, from its left upper corner, that patches cover: the rest is less than a patch wide."""
        return self.num_patches_per_side * self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches S of the model image."""
        return self.num_patches_per_side**2


def drop_nested_prefix(module: VisionTower, state_dict: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    """Convert names of checkpoints for `load_state_dict`."""
    nested, flat = prefix + "vision_tower.vision_model.", prefix + "vision_tower."
    for name in [name for name in state_dict if name.startswith(nested)]:
        state_dict[flat + name.removeprefix(nested)] = state_dict.pop(name)
