"""What an analysis is asked and what it found, every number with its interval and its rule; `to_json` has them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from patch_aligned.analysis.figures import SIZE_LIMITS_PX, Difference, Figure, Resampling
from patch_aligned.analysis.localisation_figure import PictureRow
from patch_aligned.analysis.measured_images import MeasureSettings
from patch_aligned.analysis.plain_json import plain_json
from patch_aligned.analysis.region_table import RegionRows
from patch_aligned.analysis.von_neumann import EntropyAccumulator


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
