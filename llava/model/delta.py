"""Differences of checkpoints: what `make_delta` takes away, `apply_delta` adds again.

A delta has the tensors of the target. Where the base has a tensor of the name, the delta holds target - base; the parts
that only a LLaVA has (projector, tower) are held as they are, and so are the rows of tokens that the target added.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llava.model.checkpoint import VOCABULARY_TABLES

LLAVA_PARTS = ("mm_projector", "vision_tower", "image_newline")
"""Parts of the names of tensors that no base has."""


def combined(
    base: Mapping[str, Tensor], other: Mapping[str, Tensor], sign: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`other + sign * base`, computed in `dtype`, under the names of `other`.

    Raises:
        ValueError: a tensor has no counterpart in the base, or one of another shape; names it.
    """
    result = {}
    for name in other:
        tensor = other[name].to(dtype, copy=True)
        if name in base:
            below = base[name].to(dtype)
            _require_fitting(name, tensor, below)
            tensor[: len(below)] += sign * below
        elif not any(part in name for part in LLAVA_PARTS):
            raise ValueError(
                f"{name} is not in the base model, and is no part that only a LLaVA has ({', '.join(LLAVA_PARTS)}). "
                "Check that --base-model-path is the LLM that the target was trained from."
            )
        result[name] = tensor
    return result


def _require_fitting(name: str, tensor: Tensor, below: Tensor) -> None:
    if tensor.shape == below.shape:
        return
    may_grow = name in VOCABULARY_TABLES and tensor.shape[1:] == below.shape[1:] and len(tensor) > len(below)
    if not may_grow:
        raise ValueError(
            f"{name} has the shape {tuple(tensor.shape)}, and {tuple(below.shape)} in the base model. Only "
            f"{' and '.join(VOCABULARY_TABLES)} may have more rows than the base."
        )
