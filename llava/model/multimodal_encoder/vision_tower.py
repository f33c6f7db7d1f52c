"""What all vision towers share: a pretrained encoder, of which one hidden layer's patch features are used.

Letters: B images, S patches, C width of the tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel


class VisionTower(nn.Module):
    """A frozen vision encoder with upstream's interface; one subclass a kind of encoder.

    Args:
        vision_tower: hub name or local folder of the encoder.
        args: read for `mm_vision_select_layer`, `mm_vision_select_feature` (`patch` drops the CLS token, `cls_patch`
            keeps it) and `unfreeze_mm_vision_tower`.
        delay_load: read only the configuration now; `load_model` reads the weights.
    """

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]

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
        self.is_loaded = False
        self.cfg_only = self.config_class.from_pretrained(vision_tower)
        # The PIL processor gives the pixels that published checkpoints were trained on; torchvision's differ by up to
        # 0.16 after normalisation.
        self.image_processor = AutoImageProcessor.from_pretrained(vision_tower, backend="pil")
        if not delay_load:
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Reads the weights; a second call does nothing."""
        if self.is_loaded:
            return
        self.vision_tower = self.model_class.from_pretrained(self.vision_tower_name, device_map=device_map)
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def feature_select(self, image_forward_outs: Any) -> Tensor:
        """The chosen hidden layer `[B, 1 + S, C]`, without or with the CLS token."""
        features = image_forward_outs.hidden_states[self.select_layer]
        return features[:, 1:] if self.select_feature == "patch" else features

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Features `[B, S, C]` of images `[B, 3, H, W]`, in the images' dtype; a list of images gives a list."""
        if isinstance(images, list):
            return [self.encode(image[None]).to(image.dtype) for image in images]
        return self.encode(images).to(images.dtype)

    def encode(self, images: Tensor) -> Tensor:
        """Features `[B, S, C]` in the tower's own dtype. Gradients flow only where the tower is trained."""
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            outputs = self.vision_tower(images.to(self.device, self.dtype), output_hidden_states=True)
            return self.feature_select(outputs)

    def checkpoint_name(self, name: str) -> str:
        """The name under which a checkpoint of the whole model holds the tensor that the model calls `name`."""
        return name

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
    def image_side(self) -> int:
        """Side of the square model image, in pixels."""
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the model image."""
        return self.image_side // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches S of the model image."""
        return self.num_patches_per_side**2
