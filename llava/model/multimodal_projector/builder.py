"""Projectors: from the width of the vision tower to the width of the LLM."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn


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
    """Builds the projector that `config.mm_projector_type` names: `linear`, `mlpNx_gelu` (any N) or `identity`.

    Args:
        config: read for `mm_projector_type` (default `linear`), `mm_hidden_size` (in) and `hidden_size` (out).
        delay_load: accepted for upstream's callers; a projector has no weights of its own to load.

    Raises:
        ValueError: the type is not known.
    """
    projector_type = getattr(config, "mm_projector_type", "linear")
    if projector_type == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    if projector_type == "identity":
        return IdentityMap()
    if match := re.fullmatch(r"mlp(\d+)x_gelu", projector_type):
        depth = int(match.group(1))
        layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
        for _ in range(1, depth):  # upstream parity: mlp0x_gelu is mlp1x_gelu
            layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
        return nn.Sequential(*layers)
    raise ValueError(
        f"Unknown projector type: {projector_type}. Set --mm_projector_type to `linear`, `mlp2x_gelu` (any number of "
        "layers) or `identity`."
    )
