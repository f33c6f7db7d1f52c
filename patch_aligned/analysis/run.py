"""An analysis: several models on one set of images.

The paper's Tables 1, 2 and 3 are `entropy_*`, `align_px` and `cosine` of its models; all beyond is there to judge them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from llava.mm_utils import UnreadableImageError, load_rgb_image
from patch_aligned.analysis.alignment import score_regions
from patch_aligned.analysis.entropy import EntropyAccumulator
from patch_aligned.analysis.localisation import PictureRow, picture_cell
from patch_aligned.analysis.regions import (
    FIGURES,
    SIZE_LIMITS_PX,
    Difference,
    Figure,
    RegionRows,
    RegionTable,
    Resampling,
    differences,
    figures_by_label,
    figures_by_size,
    figures_of,
    permute_labels,
    rules_of,
)
from patch_aligned.analysis.sets import AnnotatedSet, open_annotated_set
from patch_aligned.cells import TokenGrid
from patch_aligned.images import image_path
from patch_aligned.masks import require_size, token_coverage_of_regions
from patch_aligned.models.base import Encoder, VisionLanguageModel
from patch_aligned.pad import AnnotatedImage, Region

# The images that a measure runs over: which regions count, which labels they are compared with, which are shown.
#
# The file is read twice: once for the labels alone, once with the images, which stream by. Of all images together
# nothing is kept but one label a region.
#
# Letters: R regions of an image.


@dataclass(frozen=True)
class MeasureSettings:
    """What decides the numbers, beside the data and the weights.

    Attributes:
        data: file of annotated images, in any of `annotated_sets.FORMATS`.
        image_folder: folder that its image ids are relative to.
        threshold_rule: name of a rule of `alignment.THRESHOLD_RULES`.
        min_coverage: share of a token's cell from which on it counts as covered.
        limit: only so many images; None for all.
        subset: which: the `first` of the file, or a `random` choice that hangs on `seed` and the images' ids.
        region_kind: only regions whose extra key `kind` has this value; None for all.
        seed: of the shuffled labels, and of a random subset.
        batch_size: images in a forward pass; no number depends on it.
        picture_rows: images kept for the picture.
        data_format: of `data`.
        on_error: what an image does that is missing, broken, or of another size than its record's: `fail` stops,
            `skip` leaves it out of the set, as if it had never been there, and lists it.
    """

    data: Path
    image_folder: Path
    threshold_rule: str = "mid_range"
    min_coverage: float = 0.5
    limit: int | None = None
    region_kind: str | None = None
    seed: int = 0
    batch_size: int = 8
    picture_rows: int = 4
    data_format: str = "auto"
    subset: Literal["first", "random"] = "first"
    on_error: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class Survey:
    """What must be known of all images before the first is measured.

    Attributes:
        annotated: the images.
        images: how many there are.
        labels: all different labels of selected regions, in the order in which they come.
        own: for each selected region, in order, the index of its label.
        shuffled: for each selected region the index of the label it is compared with as a control, -1 where there is
            none; see `permute_labels`.
        pictured: positions of the images that the picture shows, spread evenly over those with regions.
    """

    annotated: Iterable[AnnotatedImage]
    images: int
    labels: list[str]
    own: Tensor
    shuffled: Tensor
    pictured: frozenset[int]

    @classmethod
    def of(cls, annotated: Iterable[AnnotatedImage], settings: MeasureSettings) -> Survey:
        """Reads all records once, and looks whether their images are there.

        Raises:
            FileNotFoundError: images are missing.
            ValueError: no region is selected, or an image's path leads out of the image folder.
        """
        index_of_label: dict[str, int] = {}
        own = array("q")
        showable: list[int] = []
        kinds: set[str] = set()
        images = missing = 0
        first_missing: Path | None = None
        for image in annotated:
            path = image_path(settings.image_folder, image.image_id)
            if not path.is_file():
                missing, first_missing = missing + 1, first_missing or path
            tags = [region.tag for region in _selected(image, settings)]
            kinds |= {str(region.extra["kind"]) for region in image.regions if "kind" in region.extra}
            own.extend(index_of_label.setdefault(tag, len(index_of_label)) for tag in tags)
            if tags:
                showable.append(images)
            images += 1
        if missing:
            raise FileNotFoundError(
                f"{settings.data}: {missing:,} of {images:,} images are missing, the first is {first_missing}. Pass "
                "the --image-folder that its paths are relative to, or leave them out with --on_error skip."
            )
        if not own:
            chosen = f" of kind {settings.region_kind!r} (kinds in the file: {sorted(kinds) or 'none'})"
            raise ValueError(
                f"{settings.data}: no regions{chosen if settings.region_kind else ''} in {images} images, so nothing "
                "can be aligned. Pass --data a PAD file whose records have labels."
            )
        rows = min(settings.picture_rows, len(showable))
        pictured = frozenset(showable[(2 * row + 1) * len(showable) // (2 * rows)] for row in range(rows))
        sources = permute_labels(own, settings.seed)
        shuffled = [-1 if source is None else own[source] for source in sources]
        return cls(annotated, images, list(index_of_label), torch.tensor(own), torch.tensor(shuffled), pictured)


def open_images(settings: MeasureSettings) -> AnnotatedSet:
    """The images that `settings` choose; with `on_error="skip"` all are decoded once to find those left out.

    Raises:
        ValueError: see `open_annotated_set`, or every image would be left out.
        FileNotFoundError: there is no such file.
    """
    annotated = open_annotated_set(settings.data, settings.image_folder, settings.data_format)
    if settings.limit is not None and settings.subset == "random":
        annotated = annotated.random_subset(settings.limit, settings.seed)
    elif settings.limit is not None:
        annotated = annotated.first(settings.limit)
    if settings.on_error == "fail":
        return annotated
    annotated = annotated.without(_broken_images(annotated, settings.image_folder))
    if annotated.broken and next(iter(annotated), None) is None:
        first = next(iter(annotated.broken.values()))
        raise ValueError(
            f"{settings.data}: none of its {len(annotated.broken):,} images can be measured. The first: {first}. Is "
            f"--image-folder {settings.image_folder} the right one?"
        )
    return annotated


def _broken_images(annotated: Iterable[AnnotatedImage], image_folder: Path) -> dict[str, str]:
    broken = {}
    for image in annotated:
        path = image_path(image_folder, image.image_id)
        try:
            file_wh = load_rgb_image(path).size
        except (FileNotFoundError, UnreadableImageError) as error:
            broken[image.image_id] = str(error)
        else:
            if file_wh != image.size_wh:
                broken[image.image_id] = f"{path}: found {list(file_wh)} pixels, its record says {list(image.size_wh)}"
    return broken


class MeasuredImage:
    """One image with its regions, as all projectors read it.

    Attributes:
        pixels: `[3, side, side]`, as the tower sees it.
        own, shuffled: `[R]`, see `Survey`.
        picture: the row that the picture shows of it, or None.
    """

    def __init__(
        self,
        annotated: AnnotatedImage,
        regions: Sequence[Region],
        own: Tensor,
        shuffled: Tensor,
        encoder: Encoder,
        settings: MeasureSettings,
    ):
        self.own, self.shuffled = own, shuffled
        self._annotated, self._regions = annotated, regions
        self._rle_masks = [region.rle_mask for region in regions]
        self._record = f"{settings.data}: {annotated.image_id}"
        self._encoder = encoder
        self._coverage: dict[tuple[int, int], Tensor] = {}
        try:
            image = load_rgb_image(image_path(settings.image_folder, annotated.image_id))
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{error}, or leave images like it out with --on_error skip") from error
        self._file_wh = image.size
        self.pixels = encoder.inputs([image])[0]  # [3, side, side]
        self._original = image
        self.picture: PictureRow | None = None
        self.pictured_region = 0

    def areas_px(self) -> list[float]:
        """Area of each region in pixels of the original image."""
        size_hw = list(self._annotated.size_wh[::-1])
        encoded = [{"size": size_hw, "counts": rle_mask.encode()} for rle_mask in self._rle_masks]
        return coco_mask.area(encoded).tolist() if encoded else []

    def cells(self, shape: tuple[int, int]) -> TokenGrid:
        """The cells of `shape` (rows, cols) visual tokens."""
        [grid] = self._encoder.layout(self._file_wh, shape).grids
        return grid

    def coverage(self, shape: tuple[int, int]) -> Tensor:
        """`[R, rows, cols]`, share of each token's cell that each region covers.

        Raises:
            PatchMaskError: the file's size is not the record's.
        """
        if shape not in self._coverage:
            grid = self.cells(shape)
            coverage = token_coverage_of_regions(self._rle_masks, self._annotated.size_wh, grid, self._record)
            self._coverage[shape] = torch.from_numpy(coverage)
        return self._coverage[shape]

    def show(self) -> None:
        """Prepares a row of the picture: the region that is largest in the original image, whatever the tower.

        No score chooses what is shown, and towers that cut the image differently show the same.
        """
        require_size(self._annotated.size_wh, self._file_wh, self._record)
        self.pictured_region = int(np.argmax(self.areas_px()))
        width, height = self._annotated.size_wh
        encoded = {"size": [height, width], "counts": self._rle_masks[self.pictured_region].encode()}
        self.picture = PictureRow(
            image_id=self._annotated.image_id,
            label=self._regions[self.pictured_region].tag,
            image=np.asarray(self._original),
            truth=coco_mask.decode(encoded).astype(bool),
        )


def measured_images(settings: MeasureSettings, survey: Survey, encoder: Encoder) -> Iterator[MeasuredImage]:
    """Yields the images of `survey` in order, one at a time.

    Raises:
        OSError: an image is missing or broken.
        ValueError: an image's size is not its record's, or its path leads out of the image folder.
    """
    first_region = 0
    for index, annotated in enumerate(survey.annotated):
        regions = _selected(annotated, settings)
        of_image = slice(first_region, first_region + len(regions))
        first_region += len(regions)
        image = MeasuredImage(annotated, regions, survey.own[of_image], survey.shuffled[of_image], encoder, settings)
        if index in survey.pictured:
            image.show()
        yield image


def _selected(annotated: AnnotatedImage, settings: MeasureSettings) -> list[Region]:
    kind = settings.region_kind
    return [region for region in annotated.regions if kind is None or region.extra.get("kind") == kind]


# One pass over annotated images: moments and region scores of several projectors on the same features.
#
# Letters: B images, S patches, d width of the tower, T visual tokens, D width of the LLM, R regions of an image,
# L different labels.


@dataclass(frozen=True)
class ImagePass:
    """What one pass over the images collects: numbers of the tower and of each projector behind it."""

    before: EntropyAccumulator
    runs: list[ProjectorRun]
    images: int
    picture: list[PictureRow]


def pass_over_images(
    encoder: Encoder,
    projectors: Sequence[VisionLanguageModel],
    settings: MeasureSettings,
    survey: Survey,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> ImagePass:
    """Reads every image once and adds it up for each projector.

    Args:
        encoder: gives the features, once an image.
        projectors: what to measure.
        settings: data and rules.
        survey: of the images.
        on_images: told how many images are done, and of how many.

    Raises:
        FileNotFoundError: an image is missing.
        ValueError: no region lies in the model's image, or an image's size is not its record's.
    """
    before = EntropyAccumulator(encoder.width, encoder.device)
    directions: dict[int, Tensor] = {}  # projectors of one LLM share its labels' [L, D]
    for words in (projector.words for projector in projectors):
        if id(words) not in directions:
            directions[id(words)] = words.directions_of_labels(survey.labels).to(encoder.device)
    runs = [
        ProjectorRun(projector, directions[id(projector.words)], settings, encoder.device) for projector in projectors
    ]
    picture: list[PictureRow] = []
    stream = measured_images(settings, survey, encoder)
    done = 0
    while batch := list(islice(stream, settings.batch_size)):
        features = encoder.features(torch.stack([image.pixels for image in batch]))  # [B, 3, side, side] -> [B, S, d]
        before.update(features)
        for run in runs:
            run.update(features, batch)
        picture += [image.picture for image in batch if image.picture is not None]
        done += len(batch)
        on_images(done, survey.images)
    if all(np.isnan(run.regions.rows().scores["iou_px"]).all() for run in runs):
        raise ValueError(
            f"{settings.data}: all {len(survey.own)} regions lie outside the model's image, cut away by its "
            f"{encoder.image_aspect_ratio!r} geometry. Pass --image-aspect-ratio pad, which keeps the whole image; a "
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

    def __init__(
        self, projector: VisionLanguageModel, label_directions: Tensor, settings: MeasureSettings, device: str
    ):
        self.projector = projector
        self.grid = (0, 0)
        self.entropy = EntropyAccumulator(projector.words.width, device)
        self.regions = RegionTable()
        self._label_directions, self._settings, self._device = label_directions, settings, device  # [L, D]

    def update(self, features: Tensor, batch: Sequence[MeasuredImage]) -> None:
        """Adds images by their features `[B, S, d]`."""
        tokens = self.projector.visual_tokens(features)  # [B, T, D]
        self.grid = self.projector.shape
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
                cell = picture_cell(image.cells(self.grid), direction, visual_tokens, coverage[region], rule)
                row.cells[self.projector.name] = cell


# Results as strict JSON: dataclasses as objects, arrays as lists, paths as text, what is not finite as null.


def plain_json(value: Any) -> Any:
    """`value` in terms that `json.dumps(..., allow_nan=False)` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain_json(value.tolist())
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# What an analysis is asked and what it found, every number with its interval and its rule; `to_json` has them all.


@dataclass(frozen=True)
class AnalysisSettings:
    """What decides the numbers.

    Attributes:
        measure: data, threshold rule, coverage, subset.
        resampling: of the intervals.
        untrained_seeds: of the random projectors that each model is compared with; empty for none.
    """

    measure: MeasureSettings
    resampling: Resampling = field(default_factory=Resampling)
    untrained_seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class EntropyFigures:
    """Von Neumann entropy of tokens, in nats, and what it is taken from.

    Attributes:
        entropy_nats: of the spectrum; at most `log width`.
        effective_rank: `exp(entropy_nats)`.
        width: of a token.
        tokens: how many.
        spectrum: eigenvalues, falling, sum 1.
    """

    entropy_nats: float
    effective_rank: float
    width: int
    tokens: int
    spectrum: list[float]

    @classmethod
    def of(cls, seen: EntropyAccumulator) -> EntropyFigures:
        """From the tokens seen."""
        rank = seen.effective_rank()
        return cls(seen.entropy_nats(), rank, seen.width, seen.token_count, seen.spectrum().tolist())


@dataclass(frozen=True)
class MeanAndSd:
    """Over seeds: mean, and standard deviation of a sample (NaN for one seed); NaN where a seed's value is."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanAndSd:
        """From one value a seed."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"))


@dataclass(frozen=True)
class UntrainedFigures:
    """Random projectors of a model's shape, on the same images.

    Attributes:
        seeds: one projector each.
        entropy_after_nats, entropy_drop_nats, effective_rank_after: over seeds.
        figures: by the names of `FIGURES`, over seeds.
    """

    seeds: tuple[int, ...]
    entropy_after_nats: MeanAndSd
    entropy_drop_nats: MeanAndSd
    effective_rank_after: MeanAndSd
    figures: dict[str, MeanAndSd]


@dataclass(frozen=True)
class RegionCounts:
    """What was counted and what was not.

    Attributes:
        images_with_regions: images that have a region.
        images_without_token: images that have regions, none of which covers a token.
        regions: regions seen.
        regions_outside: regions outside the model's image; no figure counts them.
        regions_without_token: regions inside that cover no token; only figures by area count them.
    """

    images_with_regions: int
    images_without_token: int
    regions: int
    regions_outside: int
    regions_without_token: int

    @classmethod
    def of(cls, rows: RegionRows) -> RegionCounts:
        """From the regions of a set."""
        inside, covering = (~np.isnan(rows.scores[name]) for name in ("iou_px", "cosine"))
        images = len(np.unique(rows.image))
        return cls(
            images_with_regions=images,
            images_without_token=images - len(np.unique(rows.image[covering])),
            regions=len(rows.image),
            regions_outside=int((~inside).sum()),
            regions_without_token=int((inside & ~covering).sum()),
        )


@dataclass(frozen=True)
class ModelAnalysis:
    """All numbers of one model.

    Attributes:
        source, tower, words: where projector, features and word embeddings come from.
        grid: rows and columns of visual tokens.
        entropy_before, entropy_after: of the features and of the visual tokens.
        entropy_drop_nats: before less after.
        figures: by the names of `FIGURES`.
        by_size, by_label: headline figures of the small, medium and large regions, and of each label.
        counts: what was counted.
        untrained: random projectors of the same shape; None if none were asked for.
    """

    source: str
    tower: str
    words: str
    grid: tuple[int, int]
    entropy_before: EntropyFigures
    entropy_after: EntropyFigures
    entropy_drop_nats: float
    figures: dict[str, Figure]
    by_size: dict[str, dict[str, Figure]]
    by_label: dict[str, dict[str, Figure]]
    counts: RegionCounts
    untrained: UntrainedFigures | None


@dataclass(frozen=True)
class Comparison:
    """Figures of the model `first` less those of `second`, over the same draws of images."""

    first: str
    second: str
    figures: dict[str, Difference]


@dataclass(frozen=True)
class Analysis:
    """All that an analysis found.

    Attributes:
        settings: what decided the numbers.
        rules: what each figure is, in words.
        data_format: of the set.
        images: how many.
        labels: different labels of the set.
        skipped: annotations of the whole file that were no regions, by reason.
        broken_images: images left out by `on_error="skip"`, by id, each with the reason.
        images_per_second: of the passes over the images, all models together; intervals not counted.
        models: by name, in the order given.
        comparisons: of every pair, the later less the earlier.
        picture: rows for `save_localisation_figure`.
    """

    settings: AnalysisSettings
    rules: dict[str, str]
    data_format: str
    images: int
    labels: int
    skipped: Mapping[str, int]
    broken_images: Mapping[str, str]
    images_per_second: float
    models: dict[str, ModelAnalysis]
    comparisons: list[Comparison]
    picture: list[PictureRow]

    @property
    def counts_differ(self) -> bool:
        """Whether models count different regions, as those do that cut images differently or have another grid."""
        return len({model.counts for model in self.models.values()}) > 1

    def to_json(self) -> dict[str, Any]:
        """Every number, as strict JSON; of the picture its ids, labels and scores."""
        rows = [
            {"image_id": row.image_id, "label": row.label, "iou_px": {n: cell.iou_px for n, cell in row.cells.items()}}
            for row in self.picture
        ]
        return {**plain_json(replace(self, picture=[])), "size_limits_px": list(SIZE_LIMITS_PX), "picture": rows}


def analyse(
    models: Sequence[VisionLanguageModel],
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
    encoders = {id(model.encoder): model.encoder for model in models}
    untrained = _untrained_by_shape(models, settings.untrained_seeds)
    runs: dict[str, ProjectorRun] = {}
    before: dict[int, EntropyAccumulator] = {}
    picture: list[PictureRow] = []
    started = time.perf_counter()
    for place, (key, encoder) in enumerate(encoders.items()):
        measured = [model for model in models if model.encoder is encoder]
        twins = [twin for shape, twins in untrained.items() if shape[0] == key for twin in twins]
        found = pass_over_images(
            encoder,
            [*measured, *twins],
            settings.measure,
            survey,
            partial(_tell, on_images, place, len(encoders)),
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
            entropies_before[id(model.encoder)],
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
        images_per_second=survey.images * len(encoders) / seconds,
        models=found_models,
        comparisons=comparisons,
        picture=picture,
    )


def _tell(on_images: Callable[[int, int], None], place: int, passes: int, done: int, total: int) -> None:
    on_images(place * total + done, passes * total)


def _model_analysis(
    model: VisionLanguageModel,
    run: ProjectorRun,
    rows: RegionRows,
    entropy_before: EntropyFigures,
    untrained: UntrainedFigures | None,
    labels: Sequence[str],
    settings: AnalysisSettings,
) -> ModelAnalysis:
    entropy_after = EntropyFigures.of(run.entropy)
    return ModelAnalysis(
        source=model.source,
        tower=model.encoder.name,
        words=model.words.source,
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


def _joined(rows: list[PictureRow], more: list[PictureRow]) -> list[PictureRow]:
    """Rows of two passes over the same images; each model adds its cells."""
    if not rows:
        return more
    return [replace(row, cells=row.cells | other.cells) for row, other in zip(rows, more, strict=True)]
