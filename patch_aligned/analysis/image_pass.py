"""One pass over annotated images: moments and region scores of several projectors on the same features.

Letters: B images, S patches, d width of the tower, T visual tokens, D width of the LLM, R regions of an image,
L different labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from patch_aligned.analysis.alignment import score_regions
from patch_aligned.analysis.embeddings import MeasuredProjector, Tower
from patch_aligned.analysis.localisation import picture_cell
from patch_aligned.analysis.localisation_figure import PictureRow
from patch_aligned.analysis.measured_images import MeasuredImage, MeasureSettings, Survey, measured_images
from patch_aligned.analysis.region_table import RegionTable
from patch_aligned.analysis.von_neumann import EntropyAccumulator


@dataclass(frozen=True)
class ImagePass:
    """What one pass over the images collects: numbers of the tower and of each projector behind it."""

    before: EntropyAccumulator
    runs: list[ProjectorRun]
    images: int
    picture: list[PictureRow]


def pass_over_images(
    tower: Tower,
    projectors: Sequence[MeasuredProjector],
    settings: MeasureSettings,
    survey: Survey,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> ImagePass:
    """Reads every image once and adds it up for each projector.

    Args:
        tower: gives the features, once an image.
        projectors: what to measure.
        settings: data and rules.
        survey: of the images.
        on_images: told how many images are done, and of how many.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: no region lies in the model's image, or an image's size is not its record's.
    """
    before = EntropyAccumulator(tower.width, tower.device)
    directions: dict[int, Tensor] = {}  # projectors of one LLM share its labels' [L, D]
    for words in (projector.words for projector in projectors):
        if id(words) not in directions:
            directions[id(words)] = words.directions_of_labels(survey.labels).to(tower.device)
    runs = [
        ProjectorRun(projector, directions[id(projector.words)], settings, tower.device) for projector in projectors
    ]
    picture: list[PictureRow] = []
    stream = measured_images(settings, survey, tower)
    done = 0
    while batch := list(islice(stream, settings.batch_size)):
        features = tower.features(torch.stack([image.pixels for image in batch]))  # [B, 3, side, side] -> [B, S, d]
        before.update(features)
        for run in runs:
            run.update(features, batch)
        picture += [image.picture for image in batch if image.picture is not None]
        done += len(batch)
        on_images(done, survey.images)
    if all(np.isnan(run.regions.rows().scores["iou_px"]).all() for run in runs):
        raise ValueError(
            f"{settings.data}: all {len(survey.own)} regions lie outside the model's image, cut away by its "
            f"{tower.image_aspect_ratio!r} geometry. Pass --image-aspect-ratio pad, which keeps the whole image; a "
            "model of transformers has it from its image processor."
        )
    return ImagePass(before, runs, done, picture)


class ProjectorRun:
    """One projector's sums over the images.

    Attributes:
        projector: which.
        grid: rows and columns of its visual tokens.
        entropy: of the visual tokens.
        regions: scores of all regions.
    """

    def __init__(self, projector: MeasuredProjector, label_directions: Tensor, settings: MeasureSettings, device: str):
        self.projector = projector
        self.grid = (0, 0)
        self.entropy = EntropyAccumulator(projector.words.width, device)
        self.regions = RegionTable()
        self._label_directions, self._settings, self._device = label_directions, settings, device  # [L, D]

    def update(self, features: Tensor, batch: Sequence[MeasuredImage]) -> None:
        """Adds images by their features `[B, S, d]`."""
        tokens, self.grid = self.projector.visual_tokens(features)  # [B, T, D]
        self.entropy.update(tokens)
        rule = self._settings.threshold_rule
        for image, visual_tokens in zip(batch, tokens, strict=True):
            coverage = image.coverage(self.grid).to(self._device)  # [R, rows, cols]
            own = image.own.to(self._device)  # [R]
            scores = score_regions(
                visual_tokens,
                self._label_directions,
                own,
                coverage,
                rule=rule,
                min_coverage=self._settings.min_coverage,
                shuffled=image.shuffled.to(self._device),
            )
            self.regions.update(scores, image.own.tolist(), image.areas_px())
            if (row := image.picture) is not None and self.projector.pictured:
                region = image.pictured_region
                direction = self._label_directions[own[region]]  # [D]
                cell = picture_cell(row.image, row.truth, direction, visual_tokens, coverage[region], rule)
                row.cells[self.projector.name] = cell
