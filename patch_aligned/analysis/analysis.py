"""An analysis: several models on one set of images.

The paper's Tables 1, 2 and 3 are `entropy_*`, `align_px` and `cosine` of its models; all beyond is there to judge them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from patch_aligned.analysis.analysed_models import AnalysedModel
from patch_aligned.analysis.analysis_results import (
    Analysis,
    AnalysisSettings,
    Comparison,
    EntropyFigures,
    MeanAndSd,
    ModelAnalysis,
    RegionCounts,
    UntrainedFigures,
)
from patch_aligned.analysis.embeddings import MeasuredProjector
from patch_aligned.analysis.figures import (
    FIGURES,
    Resampling,
    differences,
    figures_by_label,
    figures_by_size,
    figures_of,
    rules_of,
)
from patch_aligned.analysis.image_pass import ProjectorRun, pass_over_images
from patch_aligned.analysis.localisation_figure import PictureRow
from patch_aligned.analysis.measured_images import Survey, open_images
from patch_aligned.analysis.region_table import RegionRows
from patch_aligned.analysis.von_neumann import EntropyAccumulator


def analyse(
    models: Sequence[AnalysedModel],
    settings: AnalysisSettings,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Analyses models on one set: one pass over the images for each tower.

    Of the images only the scores of their regions are kept, a hundred bytes each, and a `d x d` moment a projector.

    Args:
        models: what to compare; of those that share a tower, features are computed once.
        settings: data and rules.
        on_images: told how many images are done, and of how many, all passes together.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: there are no regions, none lies in a model's image or covers a token, or an image's size is not its
            record's.
    """
    annotated = open_images(settings.measure)
    survey = Survey.of(annotated, settings.measure)
    towers = {id(model.tower): model.tower for model in models}
    untrained = _untrained_by_shape(models, settings.untrained_seeds)
    runs: dict[str, ProjectorRun] = {}
    before: dict[int, EntropyAccumulator] = {}
    picture: list[PictureRow] = []
    started = time.perf_counter()
    for place, (key, tower) in enumerate(towers.items()):
        projectors = [model.projector for model in models if model.tower is tower]
        twins = [twin for shape, twins in untrained.items() if shape[0] == key for twin in twins]
        found = pass_over_images(
            tower,
            [*projectors, *twins],
            settings.measure,
            survey,
            partial(_tell, on_images, place, len(towers)),
        )
        before[key] = found.before
        runs |= {run.projector.name: run for run in found.runs}
        picture = _joined(picture, found.picture)
    seconds = time.perf_counter() - started

    rows = {name: run.regions.rows() for name, run in runs.items()}
    if all(np.isnan(rows[model.name].scores["cosine"]).all() for model in models):
        raise ValueError(
            f"{settings.measure.data}: none of the {len(survey.own)} regions covers a token from "
            f"{settings.measure.min_coverage} of its cell on: they are smaller than the grid can tell. Choose a set "
            "with larger regions, or pass a lower --min-coverage."
        )
    entropies_before = {key: EntropyFigures.of(seen) for key, seen in before.items()}
    untrained_found = {
        shape: _untrained_figures(
            [runs[twin.name] for twin in twins], entropies_before[shape[0]].entropy_nats, settings.untrained_seeds
        )
        for shape, twins in untrained.items()
    }
    found_models = {
        model.name: _model_analysis(
            model,
            runs[model.name],
            rows[model.name],
            entropies_before[id(model.tower)],
            untrained_found.get(_shape_of(model)),
            survey.labels,
            settings,
        )
        for model in models
    }
    comparisons = [
        Comparison(later.name, earlier.name, differences(rows[later.name], rows[earlier.name], settings.resampling))
        for place, later in enumerate(models)
        for earlier in models[:place]
    ]
    measure = settings.measure
    return Analysis(
        settings=settings,
        rules=rules_of(measure.threshold_rule, measure.min_coverage, measure.seed, len(survey.labels)),
        data_format=annotated.format,
        images=survey.images,
        labels=len(survey.labels),
        skipped=annotated.skipped,
        broken_images=annotated.broken,
        images_per_second=survey.images * len(towers) / seconds,
        models=found_models,
        comparisons=comparisons,
        picture=picture,
    )


def _tell(on_images: Callable[[int, int], None], place: int, passes: int, done: int, total: int) -> None:
    on_images(place * total + done, passes * total)


def _model_analysis(
    model: AnalysedModel,
    run: ProjectorRun,
    rows: RegionRows,
    entropy_before: EntropyFigures,
    untrained: UntrainedFigures | None,
    labels: Sequence[str],
    settings: AnalysisSettings,
) -> ModelAnalysis:
    entropy_after = EntropyFigures.of(run.entropy)
    return ModelAnalysis(
        source=model.projector.source,
        tower=model.tower.name,
        words=model.projector.words.source,
        grid=run.grid,
        entropy_before=entropy_before,
        entropy_after=entropy_after,
        entropy_drop_nats=entropy_before.entropy_nats - entropy_after.entropy_nats,
        figures=figures_of(rows, settings.resampling),
        by_size=figures_by_size(rows, settings.resampling),
        by_label=figures_by_label(rows, labels, settings.resampling),
        counts=RegionCounts.of(rows),
        untrained=untrained,
    )


def _untrained_figures(
    twins: Sequence[ProjectorRun], entropy_before_nats: float, seeds: tuple[int, ...]
) -> UntrainedFigures:
    after = [twin.entropy.entropy_nats() for twin in twins]
    no_interval = Resampling(resamples=0)
    figures = [figures_of(twin.regions.rows(), no_interval) for twin in twins]
    return UntrainedFigures(
        seeds=seeds,
        entropy_after_nats=MeanAndSd.of(after),
        entropy_drop_nats=MeanAndSd.of([entropy_before_nats - value for value in after]),
        effective_rank_after=MeanAndSd.of([twin.entropy.effective_rank() for twin in twins]),
        figures={name: MeanAndSd.of([of_seed[name].value for of_seed in figures]) for name in FIGURES},
    )


Shape = tuple[int, int, tuple[tuple[int, ...], ...]]
"""Tower, word embeddings, and shapes of the weights: models that share them share their random projectors."""


def _shape_of(model: AnalysedModel) -> Shape:
    weights = model.projector.projector.state_dict().values()
    return id(model.tower), id(model.projector.words), tuple(tuple(weight.shape) for weight in weights)


def _untrained_by_shape(models: Sequence[AnalysedModel], seeds: Sequence[int]) -> dict[Shape, list[MeasuredProjector]]:
    by_shape: dict[Shape, list[MeasuredProjector]] = {}
    for model in models:
        if seeds and _shape_of(model) not in by_shape:
            by_shape[_shape_of(model)] = [model.projector.untrained(seed) for seed in seeds]
    return by_shape


def _joined(rows: list[PictureRow], more: list[PictureRow]) -> list[PictureRow]:
    """Rows of two passes over the same images; ground truth is shown as the first tower sees it."""
    if not rows:
        return more
    return [replace(row, cells=row.cells | other.cells) for row, other in zip(rows, more, strict=True)]
