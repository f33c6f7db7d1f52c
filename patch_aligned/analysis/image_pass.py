"""One pass over annotated images: entropy, Align(V, W) and cosine of several projectors on the same features.

Letters: B images, S patches, d width of the tower, T visual tokens, D width of the LLM, R regions of an image,
L different labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from patch_aligned.analysis.alignment import cosine_maps, predicted_tokens, score_regions
from patch_aligned.analysis.embeddings import MeasuredProjector, Tower
from patch_aligned.analysis.localisation_figure import PictureCell, PictureRow
from patch_aligned.analysis.measured_images import (
    MeasuredImage,
    MeasureSettings,
    Survey,
    measured_images,
    open_images,
)
from patch_aligned.analysis.region_table import AlignmentResult, RegionTable
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


@dataclass(frozen=True)
class ImagePass:
    """What one pass over the images collects: numbers of the tower and of each projector behind it."""

    before: EntropyAccumulator
    runs: list[ProjectorRun]
    images: int
    picture: list[PictureRow]


def measure_projectors(
    tower: Tower,
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
    survey = Survey.of(open_images(settings), settings)
    images = pass_over_images(tower, projectors, settings, survey, on_images)
    entropy_before_nats = images.before.entropy_nats()
    return Measures(
        images=images.images,
        entropy_before_nats=entropy_before_nats,
        effective_rank_before=math.exp(entropy_before_nats),
        projectors={run.projector.name: run.result(entropy_before_nats) for run in images.runs},
        picture=images.picture,
    )


def pass_over_images(
    tower: Tower,
    projectors: Sequence[MeasuredProjector],
    settings: MeasureSettings,
    survey: Survey,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> ImagePass:
    """Reads every image once and adds it up for each projector. Raises as `measure_projectors` does."""
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
    if not any(run.regions.rows().alignment().regions_px for run in runs):
        raise ValueError(
            f"{settings.data}: all {len(survey.own)} regions lie outside the model's image, cut away by its "
            f"{tower.image_aspect_ratio!r} geometry. Pass --image-aspect-ratio pad, which keeps the whole image."
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
            if image.picture is not None and self.projector.pictured:
                shown = slice(image.pictured_region, image.pictured_region + 1)
                maps = cosine_maps(self._label_directions[own[shown]], visual_tokens)  # [1, T]
                area = coverage[shown].sum().reshape(1)
                image.picture.cells[self.projector.name] = PictureCell(
                    cosine=maps.reshape(self.grid).cpu(),
                    predicted=predicted_tokens(maps, rule, area).reshape(self.grid).cpu(),
                    iou_px=float(scores.iou_px[image.pictured_region]),
                )

    def result(self, entropy_before_nats: float) -> ProjectorMeasures:
        """The means so far."""
        after = self.entropy.entropy_nats()
        return ProjectorMeasures(
            source=self.projector.source,
            grid=self.grid,
            entropy_after_nats=after,
            entropy_drop_nats=entropy_before_nats - after,
            effective_rank_after=math.exp(after),
            alignment=self.regions.rows().alignment(),
        )
