"""Where labels are found in an image: the cosine map and the predicted tokens of each projector (Figures 1 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llava.mm_utils import load_rgb_image
from patch_aligned.analysis.alignment import cosine_maps, iou_by_area, predicted_tokens
from patch_aligned.analysis.analysed_models import AnalysedModel
from patch_aligned.analysis.localisation_figure import PictureCell, PictureRow


def localise(
    models: Sequence[AnalysedModel],
    image: Path | str,
    label: str,
    mask: np.ndarray | None = None,
    threshold_rule: str = "mid_range",
) -> PictureRow:
    """Where each model finds a label in an image; `save_localisation_figure` draws what it returns.

    Args:
        models: what is compared; each is shown the image as its tower sees it.
        image: the file.
        label: any text.
        mask: `[height, width]`, the region that the label is about; None where there is no truth, and the IoU is NaN.
        threshold_rule: which tokens of the cosine map are the prediction.

    Raises:
        OSError: the image is missing or broken.
        ValueError: the mask is not of the image's size, the rule needs one, or the label has no token.
    """
    opened = load_rgb_image(image)
    height_width = opened.size[::-1]
    if mask is None and threshold_rule == "top_area":
        raise ValueError("The rule 'top_area' is told the region's size: pass a mask, or choose another rule.")
    if mask is None:
        mask = np.zeros(height_width)
    if mask.shape != height_width:
        raise ValueError(f"{image}: the mask is {list(mask.shape)}; expected the image's {list(height_width)}.")
    mask = mask.astype(np.float64)
    features, shown, cells = {}, {}, {}
    for tower, projector in ((model.tower, model.projector) for model in models):
        if id(tower) not in features:
            pixels = tower.pixels(opened)  # [3, side, side]
            features[id(tower)] = tower.features(pixels[None])  # [1, S, d]
            truth = tower.geometry(opened.size, (1, 1)).mask_to_model(mask)  # [side, side]
            shown[id(tower)] = tower.displayed(pixels), torch.from_numpy(truth)
        tokens, grid = projector.visual_tokens(features[id(tower)])  # [1, T, D]
        coverage = torch.from_numpy(tower.geometry(opened.size, grid).token_coverage(mask[None]))[0]  # [rows, cols]
        direction = projector.words.directions_of_labels([label])[0].to(tokens)  # [D]
        cells[projector.name] = picture_cell(
            *shown[id(tower)], direction, tokens[0], coverage.to(tokens.device), threshold_rule
        )
    return PictureRow(Path(image).name, label, *shown[id(models[0].tower)], cells)


def picture_cell(
    image: Tensor, truth: Tensor, direction: Tensor, visual_tokens: Tensor, coverage: Tensor, rule: str
) -> PictureCell:
    """What one projector makes of one label.

    Args:
        image, truth: see `PictureCell`.
        direction: `[D]`, of the label.
        visual_tokens: `[S, D]`.
        coverage: `[rows, cols]`, share of each cell that the region covers.
        rule: name of the threshold rule.
    """
    maps = cosine_maps(direction[None], visual_tokens)  # [1, S]
    areas = coverage.double().reshape(1, -1)  # [rows, cols] -> [1, S]
    predicted = predicted_tokens(maps, rule, areas.sum(dim=1))  # [1, S]
    return PictureCell(
        image=image,
        truth=truth,
        cosine=maps.reshape(coverage.shape).cpu(),
        predicted=predicted.reshape(coverage.shape).cpu(),
        iou_px=float(iou_by_area(predicted, areas)),
    )
