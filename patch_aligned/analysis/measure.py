"""One pass over annotated images: entropy, Align(V, W) and cosine of several projectors on the same features.

Letters: B images, S patches, d width of the tower, T visual tokens, D width of the LLM, R regions of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from patch_aligned.analysis.alignment import (
    AlignmentAccumulator,
    AlignmentResult,
    cosine_maps,
    predicted_tokens,
    score_regions,
)
from patch_aligned.analysis.embeddings import MeasuredProjector, SharedTower
from patch_aligned.analysis.localisation_figure import PictureCell, PictureRow
from patch_aligned.analysis.measured_images import MeasuredImage, MeasureSettings, Survey, measured_images
from patch_aligned.analysis.von_neumann import EntropyAccumulator


@dataclass(frozen=True)
class ProjectorMeasures:
    """The measures of one projector. The entropy drop is before minus after."""

    source: str
    grid: tuple[int, int]
    entropy_after_nats: float
    entropy_drop_nats: float
    effective_rank_after: float
    alignment: AlignmentResult


@dataclass(frozen=True)
class Measures:
    """All that a run found."""

    images: int
    entropy_before_nats: float
    effective_rank_before: float
    projectors: dict[str, ProjectorMeasures]
    picture: list[PictureRow]


def measure_projectors(
    tower: SharedTower,
    projectors: Sequence[MeasuredProjector],
    settings: MeasureSettings,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Measures:
    """Measures all projectors in one pass over the images.

    Args:
        tower: gives the features, once an image.
        projectors: what to measure.
        settings: data and rules.
        on_images: told how many images are done, and of how many.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: there are no regions, none lies in the model's image, or an image's size is not its record's.
    """
    survey = Survey.of(settings)
    before = EntropyAccumulator(tower.width, tower.device)
    runs = [_Run(projector, settings, tower.device) for projector in projectors]
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
    if not any(run.alignment.result().regions_px for run in runs):
        raise ValueError(
            f"{settings.data}: all {len(survey.labels)} regions lie outside the model's image, cut away by its "
            f"{tower.image_aspect_ratio!r} geometry. Pass --image-aspect-ratio pad, which keeps the whole image."
        )
    entropy_before_nats = before.entropy_nats()
    return Measures(
        images=done,
        entropy_before_nats=entropy_before_nats,
        effective_rank_before=math.exp(entropy_before_nats),
        projectors={run.projector.name: run.result(entropy_before_nats) for run in runs},
        picture=picture,
    )


class _Run:
    """One projector's sums."""

    def __init__(self, projector: MeasuredProjector, settings: MeasureSettings, device: str):
        self.projector, self.settings = projector, settings
        self.grid = (0, 0)
        self.entropy = EntropyAccumulator(projector.words.width, device)
        self.alignment = AlignmentAccumulator()

    def update(self, features: Tensor, batch: Sequence[MeasuredImage]) -> None:
        tokens, self.grid = self.projector.visual_tokens(features)  # [B, T, D]
        self.entropy.update(tokens)
        for image, visual_tokens in zip(batch, tokens.cpu(), strict=True):
            if not image.labels:
                continue
            labels = self.projector.words.of_labels(image.labels)  # [R, D]
            coverage = image.coverage(self.grid)  # [R, rows, cols]
            scores = score_regions(
                visual_tokens,
                labels,
                coverage,
                rule=self.settings.threshold_rule,
                min_coverage=self.settings.min_coverage,
                shuffled_labels=self._shuffled(image),
            )
            self.alignment.update(scores)
            if image.picture is not None:
                shown = image.pictured_region
                maps = cosine_maps(labels[shown : shown + 1], visual_tokens)  # [1, T]
                area = coverage[shown].sum().reshape(1)
                image.picture.cells[self.projector.name] = PictureCell(
                    cosine=maps.reshape(self.grid),
                    predicted=predicted_tokens(maps, self.settings.threshold_rule, area).reshape(self.grid),
                    iou_px=float(scores.iou_px[shown]),
                )

    def _shuffled(self, image: MeasuredImage) -> Tensor:
        embedded = self.projector.words.of_labels(
            [label or own for label, own in zip(image.shuffled, image.labels, strict=True)]
        )
        embedded[[label is None for label in image.shuffled]] = torch.nan
        return embedded  # [R, D]

    def result(self, entropy_before_nats: float) -> ProjectorMeasures:
        after = self.entropy.entropy_nats()
        return ProjectorMeasures(
            source=self.projector.source,
            grid=self.grid,
            entropy_after_nats=after,
            entropy_drop_nats=entropy_before_nats - after,
            effective_rank_after=math.exp(after),
            alignment=self.alignment.result(),
        )
