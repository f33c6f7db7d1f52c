"""An analysis: several models on one set of images.

The paper's Tables 1, 2 and 3 are `entropy_*`, `align_px` and `cosine` of its models; all other metrics are there to
judge them.

Letters: T visual tokens of an image, S of them on one grid, D width of the LLM, R regions of an image, L different
labels of the set.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from patch_aligned.analysis.alignment import over_grids, score_regions
from patch_aligned.analysis.entropy import EntropyAccumulator
from patch_aligned.analysis.localisation import PictureCell, PictureRow, picture_cell
from patch_aligned.analysis.matching_pursuit import WordDictionary, matching_pursuit
from patch_aligned.analysis.names import NameAnalysis, NameSettings, analyse_names
from patch_aligned.analysis.regions import (
    MEASURED_SCORES,
    METRICS,
    SIZE_LIMITS_PX,
    MeasuredSet,
    MeasureSettings,
    breakdowns,
    count_regions,
    differences,
    mean_and_sd,
    metrics_of,
    open_image,
    read_set,
    rules_of,
)
from patch_aligned.analysis.words import dictionary_of
from patch_aligned.cells import Layout, TokenGrid
from patch_aligned.intervals import Resampling
from patch_aligned.masks import token_coverage_of_regions
from patch_aligned.models.base import Encoder, VisionLanguageModel
from patch_aligned.pad import AnnotatedImage


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of a whole analysis.

    Attributes:
        measure: data, threshold rule, coverage, subset.
        resampling: of the intervals.
        untrained_seeds: of the random projectors that each model is compared with; empty for none.
        names: what the LLMs are asked to name; None runs no LLM.
    """

    measure: MeasureSettings
    resampling: Resampling = field(default_factory=Resampling)
    untrained_seeds: tuple[int, ...] = ()
    names: NameSettings | None = None


@dataclass(frozen=True)
class Entropy:
    """Von Neumann entropy of tokens, and what it is taken from."""

    entropy_nats: float  # of the spectrum; at most `log width`
    effective_rank: float  # `exp(entropy_nats)`
    width: int  # of a token
    tokens: int  # how many
    spectrum: list[float]  # eigenvalues, falling, sum 1

    @classmethod
    def of(cls, seen: EntropyAccumulator) -> Entropy:
        """Return the entropy of the tokens seen."""
        nats = seen.entropy_nats()
        return cls(nats, math.exp(nats), seen.width, seen.token_count, seen.spectrum().tolist())


@dataclass(frozen=True)
class Untrained:
    """Random projectors of a model's shape on the same images; each number as `mean` and `sd` over seeds."""

    seeds: tuple[int, ...]  # one projector each
    entropy_after_nats: dict[str, float]
    entropy_drop_nats: dict[str, float]
    effective_rank_after: dict[str, float]
    metrics: pd.DataFrame  # a row for each of `METRICS`


@dataclass(frozen=True)
class ModelAnalysis:
    """All numbers of one model. The parts of breakdowns have the headline metrics, see `regions.breakdowns`."""

    source: str  # of the projector
    tower: str  # of the features
    words: str  # of the word embeddings
    grid: tuple[int, int] | None  # rows and columns of visual tokens, where all images have one grid of the same shape
    layouts: dict[str, int]  # how many images have which grids, in words, the most frequent first
    entropy_before: Entropy  # of the features
    entropy_after: Entropy  # of the visual tokens
    entropy_drop_nats: float  # before less after
    cosine_floor: float  # of the best constant vector with the labels of the set, each label counting alike
    metrics: pd.DataFrame  # see `regions.metrics_of`
    by_size: dict[str, pd.DataFrame]
    by_label: dict[str, pd.DataFrame]
    by_caption: dict[str, pd.DataFrame]  # of the regions that captions name and do not
    counts: dict[str, int]  # see `regions.count_regions`
    untrained: Untrained | None  # random projectors of the same shape; None if none were asked for
    names: NameAnalysis | None  # captions; None if no LLM was run


@dataclass(frozen=True)
class Comparison:
    """Metrics of the model `first` less those of `second`, see `regions.differences`."""

    first: str
    second: str
    metrics: pd.DataFrame


@dataclass(frozen=True)
class Analysis:
    """Results of an analysis."""

    settings: AnalysisSettings
    rules: dict[str, str]  # what each metric is, in words
    data_format: str  # of the set
    images: int
    labels: int  # different ones of the set
    skipped: Mapping[str, int]  # annotations of the whole file that were no regions, by reason
    broken_images: Mapping[str, str]  # left out by `on_error="skip"`, by id, each with the reason
    images_per_second: float  # of the passes over the images, all models together; intervals not counted
    models: dict[str, ModelAnalysis]  # by name, in the order given
    comparisons: list[Comparison]  # of every pair, the later less the earlier
    picture: list[PictureRow]  # for `save_localisation_figure`
    regions: pd.DataFrame  # scores with a row for each region and model, random projectors among them; see `regions`

    @property
    def counts_differ(self) -> bool:
        """Whether models count different regions: they crop images differently, or have another grid."""
        counts = [model.counts for model in self.models.values()]
        return any(other != counts[0] for other in counts[1:])

    def to_json(self) -> dict[str, Any]:
        """Return every number as strict JSON; of the picture ids, labels and scores; not the scores of regions."""
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "regions"}
        numbers["picture"] = [
            {"image_id": row.image_id, "label": row.label, "iou_px": {n: cell.iou_px for n, cell in row.cells.items()}}
            for row in self.picture
        ]
        return plain_json({**numbers, "size_limits_px": SIZE_LIMITS_PX})


def plain_json(value: Any) -> Any:
    """Convert to what `json.dumps(..., allow_nan=False)` takes: numbers that are not finite become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        # In analysis.json metrics are called figures.
        return {"figures" if name == "metrics" else name: plain_json(item) for name, item in named.items()}
    if isinstance(value, pd.DataFrame):
        return plain_json(value.to_dict("index"))
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def analyse(
    models: Sequence[VisionLanguageModel],
    settings: AnalysisSettings,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Analysis:
    """Analyse models on one set. The file of annotations is read once, and the images once for each encoder.

    Args:
        models: what to compare; of those that share an encoder, features are computed once.
        settings: data and rules.
        on_images: progress callback: how many images are done, and of how many, all passes together.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: there are no regions, none lies in a model's image or covers a token, or an image's size is not its
            record's.
    """
    measure, resampling = settings.measure, settings.resampling
    measured = read_set(measure)
    encoders = {id(model.encoder): model.encoder for model in models}
    images = len(measured.images)
    total, done = images * (len(encoders) + (len(models) if settings.names else 0)), 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        on_images(done, total)

    untrained = _untrained_by_shape(models, settings.untrained_seeds)
    runs: dict[str, ModelRun] = {}
    before: dict[int, Entropy] = {}
    started = time.perf_counter()
    for key, encoder in encoders.items():
        behind = [model for model in models if model.encoder is encoder]
        twins = [twin for shape, twins in untrained.items() if shape[0] == key for twin in twins]
        seen, runs_of_encoder = pass_over_images(encoder, [*behind, *twins], measured, measure, tell)
        before[key] = Entropy.of(seen)
        runs |= {run.model.name: run for run in runs_of_encoder}
    seconds = time.perf_counter() - started

    regions_of = {name: measured.regions.assign(model=name, **run.columns()) for name, run in runs.items()}
    if all(regions_of[model.name]["cosine"].isna().all() for model in models):
        raise ValueError(
            f"{measure.data}: none of the {len(measured.regions)} regions covers a token from "
            f"{measure.min_coverage} of its cell on: they are smaller than the grid can tell. Choose a set "
            "with larger regions, or pass a lower --min-coverage."
        )
    untrained_found = {}
    for shape, twins in untrained.items():
        entropies, regions = zip(*((runs[twin.name].entropy, regions_of[twin.name]) for twin in twins), strict=True)
        untrained_found[shape] = _untrained(entropies, regions, before[shape[0]].entropy_nats, settings.untrained_seeds)
    spoken: dict[str, NameAnalysis] = {}
    if settings.names:
        for name, scores, of_captions in analyse_names(models, measured, measure, settings.names, resampling, tell):
            seen = regions_of[name]["iou_px"].notna()
            regions_of[name].update(scores[seen.loc[scores.index]])
            spoken[name] = of_captions
    found_models = {}
    for model in models:
        of_model, entropy_after = regions_of[model.name], Entropy.of(runs[model.name].entropy)
        entropy_before = before[id(model.encoder)]
        found_models[model.name] = ModelAnalysis(
            source=model.source,
            tower=model.encoder.name,
            words=model.words.source,
            grid=runs[model.name].grid,
            layouts=runs[model.name].layouts,
            entropy_before=entropy_before,
            entropy_after=entropy_after,
            entropy_drop_nats=entropy_before.entropy_nats - entropy_after.entropy_nats,
            cosine_floor=float(model.words.directions_of_labels(measured.labels).double().mean(dim=0).norm()),
            metrics=metrics_of(of_model, resampling),
            **breakdowns(of_model, resampling),
            counts=count_regions(of_model),
            untrained=untrained_found.get(_shape_of(model)),
            names=spoken.get(model.name),
        )
    comparisons = [
        Comparison(later.name, earlier.name, differences(regions_of[later.name], regions_of[earlier.name], resampling))
        for position, later in enumerate(models)
        for earlier in models[:position]
    ]
    return Analysis(
        settings=settings,
        rules=rules_of(**vars(measure), label_count=len(measured.labels)),
        data_format=measured.format,
        images=images,
        labels=len(measured.labels),
        skipped=measured.skipped,
        broken_images=measured.broken,
        images_per_second=images * len(encoders) / seconds,
        models=found_models,
        comparisons=comparisons,
        picture=[
            _picture_row(
                measured, position, {model.name: runs[model.name].cells[position] for model in models}, measure
            )
            for position in measured.pictured
        ],
        regions=pd.concat(regions_of.values(), ignore_index=True),
    )


def _picture_row(
    measured: MeasuredSet, position: int, cells: dict[str, PictureCell], settings: MeasureSettings
) -> PictureRow:
    image, region = measured.images[position], measured.pictured[position]
    truth = coco_mask.decode(image.coco_masks()[region]).astype(bool)
    return PictureRow(image.image_id, image.regions[region].tag, np.asarray(open_image(image, settings)), truth, cells)


Shape = tuple[int, int, tuple[tuple[int, ...], ...]]
"""Encoder, word embeddings, and shapes of the weights: models that share them share their random projectors."""


def _shape_of(model: VisionLanguageModel) -> Shape:
    weights = model.projector.state_dict().values()
    return id(model.encoder), id(model.words), tuple(tuple(weight.shape) for weight in weights)


def _untrained_by_shape(
    models: Sequence[VisionLanguageModel], seeds: Sequence[int]
) -> dict[Shape, list[VisionLanguageModel]]:
    by_shape: dict[Shape, list[VisionLanguageModel]] = {}
    for model in models:
        if seeds and _shape_of(model) not in by_shape:
            by_shape[_shape_of(model)] = [model.untrained(seed) for seed in seeds]
    return by_shape


def _untrained(
    entropies: Sequence[EntropyAccumulator],
    regions: Sequence[pd.DataFrame],
    entropy_before_nats: float,
    seeds: tuple[int, ...],
) -> Untrained:
    after = [entropy.entropy_nats() for entropy in entropies]
    metrics = [metrics_of(of_seed, Resampling(resamples=0)) for of_seed in regions]
    spreads = [mean_and_sd([of_seed.loc[name, "value"] for of_seed in metrics]) for name in METRICS]
    return Untrained(
        seeds=seeds,
        entropy_after_nats=mean_and_sd(after),
        entropy_drop_nats=mean_and_sd([entropy_before_nats - value for value in after]),
        effective_rank_after=mean_and_sd([math.exp(value) for value in after]),
        metrics=pd.DataFrame(spreads, index=pd.Index(METRICS, name="metric")),
    )


class ModelRun:
    """What one pass over the images collects of one model."""

    def __init__(self, model: VisionLanguageModel):
        self.model = model
        self.entropy = EntropyAccumulator(model.words.width, model.encoder.device)  # of tokens that have a place
        self.shapes: Counter[tuple[tuple[int, int], ...]] = Counter()  # images by the shapes of their grids
        self.scores: list[np.ndarray] = []  # [R, scores] for each image, of those that need no LLM
        self.cells: dict[int, PictureCell] = {}  # of the picture, by the position of their image

    def see(self, tokens: Sequence[Tensor], layouts: Sequence[Layout]) -> None:
        """Count the tokens `[T, D]` of images in the entropy, and their layouts."""
        placed = [np.unique(np.concatenate([grid.tokens.ravel() for grid in layout.grids])) for layout in layouts]
        self.entropy.update(torch.cat([of[places] for of, places in zip(tokens, placed, strict=True)]))
        self.shapes.update(tuple(grid.shape for grid in layout.grids) for layout in layouts)

    def columns(self) -> dict[str, np.ndarray]:
        """The scores of all regions, by the names of `MEASURED_SCORES`."""
        return dict(zip(MEASURED_SCORES, np.concatenate(self.scores).T, strict=True))

    @property
    def grid(self) -> tuple[int, int] | None:
        """See `ModelAnalysis`."""
        shapes = list(self.shapes)
        return shapes[0][0] if len(shapes) == len(shapes[0]) == 1 else None

    @property
    def layouts(self) -> dict[str, int]:
        """See `ModelAnalysis`."""
        return {" + ".join(f"{rows} × {cols}" for rows, cols in of): n for of, n in self.shapes.most_common()}


def pass_over_images(
    encoder: Encoder,
    models: Sequence[VisionLanguageModel],
    measured: MeasuredSet,
    settings: MeasureSettings,
    tell: Callable[[int], None],
) -> tuple[EntropyAccumulator, list[ModelRun]]:
    """Open every image once and measure all models of an encoder on it: entropy of the features, and a run a model.

    `tell` is called with the number of images of each batch.
    """
    before: EntropyAccumulator | None = None
    words = {id(model.words): model.words for model in models}  # models of one LLM share them, and its labels' [L, D]
    directions = {key: of.directions_of_labels(measured.labels).to(encoder.device) for key, of in words.items()}
    best_word = {key: partial(_best_word_cosine, dictionary_of(of, encoder.device)) for key, of in words.items()}
    runs = [ModelRun(model) for model in models]
    own = torch.tensor(measured.regions["label"].cat.codes.to_numpy(), dtype=torch.int64)
    first_region = np.cumsum([0, *(len(image.regions) for image in measured.images)])
    together = settings.batch_size if encoder.takes_batches else 1
    for start in range(0, len(measured.images), together):
        batch = measured.images[start : start + together]
        opened = [open_image(image, settings) for image in batch]
        encoded = encoder.encode(opened)
        before = before or EntropyAccumulator(encoded.features.shape[-1], encoder.device)
        before.update(encoded.features)
        coverages: dict[tuple[int, TokenGrid], Tensor] = {}  # by image and grid, which models with equal layouts share
        for run in runs:
            tokens = run.model.visual_tokens(encoded)  # [T, D] each
            layouts = [run.model.layout(image.size, of) for image, of in zip(opened, tokens, strict=True)]
            run.see(tokens, layouts)
            label_directions = directions[id(run.model.words)]
            for index, (image, visual_tokens, layout) in enumerate(zip(batch, tokens, layouts, strict=True)):
                position = start + index
                of_image = slice(first_region[position], first_region[position + 1])
                own_of_image = own[of_image].to(encoder.device)  # [R]
                scores = []
                for grid in (layout.whole, *(grid for grid in layout.grids if grid is not layout.whole)):
                    if (index, grid) not in coverages:
                        coverages[index, grid] = _coverage(image, grid, settings).to(encoder.device)
                    scores.append(
                        score_regions(
                            visual_tokens[grid.tokens.ravel()],  # [T, D] -> [S, D]
                            label_directions,
                            own_of_image,
                            coverages[index, grid],  # [R, rows, cols]
                            rule=settings.threshold_rule,
                            min_coverage=settings.min_coverage,
                            shuffled=measured.shuffled[of_image].to(encoder.device),
                            positive_threshold=settings.positive_threshold,
                            best_word_cosine=best_word[id(run.model.words)],
                        )
                    )
                joined = over_grids(scores)
                run.scores.append(torch.stack([joined[name] for name in MEASURED_SCORES], dim=1).cpu().numpy())
                if position in measured.pictured and run.model.pictured:
                    region = measured.pictured[position]
                    direction = label_directions[own_of_image[region]]  # [D]
                    threshold = settings.threshold_rule, settings.positive_threshold
                    coverage = coverages[index, layout.whole][region]
                    run.cells[position] = picture_cell(layout.whole, direction, visual_tokens, coverage, *threshold)
        tell(len(batch))
    if all(np.isnan(run.columns()["iou_px"]).all() for run in runs):
        raise ValueError(
            f"{settings.data}: all {len(measured.regions)} regions lie outside the model's image, cut away by its "
            f"{encoder.image_aspect_ratio!r} geometry. Pass --image-aspect-ratio pad, which keeps the whole image; a "
            "model of transformers has it from its image processor."
        )
    assert before is not None, "read_set refuses a set without images"
    return before, runs


def _best_word_cosine(dictionary: WordDictionary, vectors: Tensor) -> Tensor:
    """Cosine of each vector `[R, D]` with the nearest word: `[R]`, float64. The first round of matching pursuit."""
    return matching_pursuit(vectors.float(), dictionary, rounds=1).cosines[:, 0].double()


def _coverage(image: AnnotatedImage, grid: TokenGrid, settings: MeasureSettings) -> Tensor:
    """`[R, rows, cols]`, share of each token's cell that each region covers."""
    rle_masks = [region.rle_mask for region in image.regions]
    record = f"{settings.data}: {image.image_id}"
    return torch.from_numpy(token_coverage_of_regions(rle_masks, image.size_wh, grid, record))
