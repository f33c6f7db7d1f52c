"""The patch loss (Eq. 5): pulls the mean visual token of each region towards the embedding of its label.

Pure functions of tensors. They compute in float32 (float64 for float64 inputs), also under autocast. The order of
summation is fixed. There is no Python loop over regions and no device synchronisation.

Letters: N images, S visual tokens of an image, D width of the LLM, R regions of all images together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def region_embeddings(visual_tokens: Tensor, region_image: Tensor, region_tokens: Tensor) -> Tensor:
    """Average the visual tokens that each region covers.

    Args:
        visual_tokens: `[N, S, D]`.
        region_image: `[R]`, index of each region's image, 0..N-1; N for a region without image.
        region_tokens: `[R, S]` bool, the tokens that each region covers.

    Returns:
        `[R, D]` in float32 (or float64); zero for a region without tokens or without image.

    Raises:
        ValueError: if the shapes do not match.
    """
    images, tokens, _ = visual_tokens.shape
    if region_tokens.shape != (region_image.shape[0], tokens):
        raise ValueError(
            f"region_tokens: found shape {tuple(region_tokens.shape)}, "
            f"expected [{region_image.shape[0]} regions, {tokens} visual tokens]"
        )
    with torch.autocast(visual_tokens.device.type, enabled=False):
        dtype = torch.promote_types(visual_tokens.dtype, torch.float32)
        is_own_image = region_image[:, None] == torch.arange(images, device=region_image.device)  # [R, N]
        is_covered = is_own_image[:, :, None] & region_tokens[:, None, :]  # [R, N, S]
        # Product with 0/1 weights: [R, N * S] is smaller than [R, S, D], and no float32 copy of the tokens is saved.
        sums = is_covered.flatten(1).to(dtype) @ visual_tokens.flatten(0, 1).to(dtype)  # -> [R, D]
        return sums / region_tokens.sum(dim=1, keepdim=True).clamp(min=1)


def region_cosines(
    visual_tokens: Tensor, region_image: Tensor, region_tokens: Tensor, label_embeddings: Tensor
) -> Tensor:
    """Return the cosine of each region's embedding with its label's, `[R]`. Table 3 reports the mean over regions.

    Args:
        visual_tokens: `[N, S, D]`.
        region_image: `[R]`, index of each region's image.
        region_tokens: `[R, S]` bool.
        label_embeddings: `[R, D]`; detached.
    """
    means = region_embeddings(visual_tokens, region_image, region_tokens)
    return F.cosine_similarity(means, label_embeddings.detach().to(means.dtype), dim=-1)  # [R, D] -> [R]


def patch_loss(cosines: Tensor, region_image: Tensor, images: int) -> Tensor:
    """Return one minus the mean cosine of each image's regions, averaged over images with regions.

    Args:
        cosines: `[R]` from `region_cosines`, of regions that cover at least one token.
        region_image: `[R]`, index of each region's image.
        images: N.

    Returns:
        A scalar. If no image has a region, it is exactly 0 and still connected to the graph.
    """
    is_own_image = region_image[:, None] == torch.arange(images, device=region_image.device)  # [R, N]
    regions = is_own_image.sum(dim=0)  # [N]
    mean_cosine = (is_own_image * cosines[:, None]).sum(dim=0) / regions.clamp(min=1)  # [N]
    is_labelled = regions > 0
    return ((1 - mean_cosine) * is_labelled).sum() / is_labelled.sum().clamp(min=1)
