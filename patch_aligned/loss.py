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


def region_cosines(region_means: Tensor, label_embeddings: Tensor) -> Tensor:
    """Return the cosine of each region's embedding with its label's, `[R]`. Table 3 reports the mean over regions.

    Args:
        region_means: `[R, D]` from `region_embeddings`.
        label_embeddings: `[R, D]`; detached.
    """
    return F.cosine_similarity(region_means, label_embeddings.detach().to(region_means.dtype), dim=-1)  # [R, D] -> [R]


def cosine_table(vectors: Tensor, others: Tensor) -> Tensor:
    """Return the cosine of each of `vectors` `[R, D]` with each of `others` `[L, D]`: `[R, L]`."""
    with torch.autocast(vectors.device.type, enabled=False):
        others = others.detach().to(vectors.dtype)
        return F.normalize(vectors, dim=-1) @ F.normalize(others, dim=-1).T


def patch_loss(cosines: Tensor, region_image: Tensor, images: int) -> Tensor:
    """Return one minus the mean cosine of each image's regions, averaged over images with regions.

    Args:
        cosines: `[R]` from `region_cosines`, of regions that cover at least one token.
        region_image: `[R]`, index of each region's image.
        images: N.

    Returns:
        A scalar. If no image has a region, it is exactly 0 and still connected to the graph.
    """
    mean_cosine, is_labelled = image_means(cosines, region_image, images)  # [N], [N]
    return ((1 - mean_cosine) * is_labelled).sum() / is_labelled.sum().clamp(min=1)


def contrastive_loss(
    label_cosines: Tensor,
    region_label: Tensor,
    negatives: Tensor,
    region_image: Tensor,
    images: int,
    temperature: float,
) -> Tensor:
    """Return InfoNCE of each region's own label among the batch's labels, averaged as `patch_loss` is. Not the paper's.

    Args:
        label_cosines: `[R, L]`, cosine of each region's embedding with each of the batch's labels.
        region_label: `[R]`, index of each region's own label.
        negatives: `[L, L]` bool, the labels that count against each label; the own label always takes part.
        region_image: `[R]`, index of each region's image.
        images: N.
        temperature: divides the cosines.
    """
    is_own = region_label[:, None] == torch.arange(label_cosines.shape[1], device=region_label.device)  # [R, L]
    logits = (label_cosines / temperature).where(is_own | negatives[region_label], -torch.inf)
    losses = F.cross_entropy(logits, region_label, reduction="none")  # [R]
    mean_loss, is_labelled = image_means(losses, region_image, images)  # [N], [N]
    return (mean_loss * is_labelled).sum() / is_labelled.sum().clamp(min=1)


def image_means(values: Tensor, region_image: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Average the values `[R]` of each image's regions, `[N]`; also returns which images have a region."""
    is_own_image = region_image[:, None] == torch.arange(images, device=region_image.device)  # [R, N]
    regions = is_own_image.sum(dim=0)  # [N]
    return (is_own_image * values[:, None]).sum(dim=0) / regions.clamp(min=1), regions > 0


def contrast_and_retrieval(label_cosines: Tensor, region_label: Tensor) -> tuple[Tensor, Tensor]:
    """Return how well regions tell their own label from the others of the batch; NaN where there is one label or none.

    Args:
        label_cosines: `[R, L]`, cosine of each region's embedding with each distinct label of the batch.
        region_label: `[R]`, index of each region's own label.

    Returns:
        Contrast, the mean over regions of the own cosine less the mean of the others; and retrieval, the share of
        regions whose nearest label is their own.
    """
    others = label_cosines.shape[1] - 1
    if others < 1:
        nothing = label_cosines.new_full((), torch.nan)
        return nothing, nothing
    own = label_cosines.gather(1, region_label[:, None])[:, 0]  # [R]
    contrast = own - (label_cosines.sum(dim=1) - own) / others  # [R]
    return contrast.mean(), (label_cosines.argmax(dim=1) == region_label).to(own.dtype).mean()
