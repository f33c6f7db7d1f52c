"""Projectors: from the width of the vision tower to the width of the LLM."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from llava.model.multimodal_projector.c_abstractor import CAbstractor

C_ABSTRACTOR_SETTINGS = {"mm_projector_num_queries": 256, "mm_projector_depth": 3, "mm_projector_hidden_size": 1024}
"""Config keys that shape a C-Abstractor, with their defaults; Honeybee itself takes 144 queries."""


class IdentityMap(nn.Module):
    """Passes features through; the tower's width must be the LLM's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns `x`."""
        return x

    @property
    def config(self) -> dict[str, str]:
        """Names the type in a config."""
        return {"mm_projector_type": "identity"}


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """Build the projector that `config.mm_projector_type` names: `linear`, `mlpNx_gelu`, `cabstractor` or `identity`.

    It maps `config.mm_hidden_size` to `config.hidden_size`. One that changes the number of visual tokens has an
    attribute `grid`, their rows and columns. `delay_load` is accepted for upstream's callers.
    """
    projector_type = getattr(config, "mm_projector_type", "linear")
    if projector_type == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if projector_type == "identity":
        return IdentityMap()
    if projector_type == "cabstractor":
        return build_c_abstractor(config)
    if match := re.fullmatch(r"mlp(\d+)x_gelu", projector_type):
        depth = int(match.group(1))
        layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
        for _ in range(1, depth):  # upstream parity: mlp0x_gelu is mlp1x_gelu
            layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
        return nn.Sequential(*layers)
    raise ValueError(
        f"Unknown projector type: {projector_type}. Set --mm_projector_type to `linear`, `mlp2x_gelu` (any number of "
        "layers), `cabstractor` or `identity`."
    )


def build_c_abstractor(config: Any) -> CAbstractor:
    """Builds a C-Abstractor."""
    patches = getattr(config, "mm_num_patches", None)
    if patches is None:
        raise ValueError(
            "mm_projector_type is `cabstractor`, but the config lacks `mm_num_patches`, the number of the vision "
            "tower's patches: set it (576 for CLIP-L/14 at 336 pixels)."
        )
    if getattr(config, "mm_vision_select_feature", "patch") != "patch":
        raise ValueError(
            f"mm_vision_select_feature is `{config.mm_vision_select_feature}`; a C-Abstractor convolves over patches "
            "and has no place for the CLS token. Set --mm_vision_select_feature patch."
        )
    queries, depth, hidden_size = (getattr(config, key, default) for key, default in C_ABSTRACTOR_SETTINGS.items())
    return CAbstractor(patches, config.mm_hidden_size, config.hidden_size, queries, depth, hidden_size)


def record_projector(config: Any, model_args: Any, tower: Any) -> None:
    """Writes into `config` what `build_vision_projector` needs: the flags of training, and sizes of the tower.

    A plain projector adds no key to those that upstream writes.
    """
    config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
    config.mm_hidden_size = tower.hidden_size
    if config.mm_projector_type == "cabstractor":
        config.mm_num_patches = tower.num_patches
        for key, default in C_ABSTRACTOR_SETTINGS.items():
            setattr(config, key, getattr(model_args, key, default))
