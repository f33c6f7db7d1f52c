"""Rows of scores: counting regions, the two kinds of mean, choosing."""

from __future__ import annotations

import math

import numpy as np
import torch

from patch_aligned.analysis.alignment import RegionScores, score_regions
from patch_aligned.analysis.regions import SCORES, RegionTable, Resampling, figures_of
from patch_aligned.analysis.run import RegionCounts

NO_INTERVALS = Resampling(resamples=0)
LABEL = torch.tensor([[1.0, 0]])
TOKENS = torch.eye(2)


def scored(*coverage: list[float]) -> RegionScores:
    """Scores of regions of the one label, which the first of two tokens shows."""
    own = torch.zeros(len(coverage), dtype=torch.int64)
    return score_regions(TOKENS, LABEL, own, torch.tensor(coverage, dtype=torch.float64).reshape(-1, 2))


def test_regions_outside_or_without_token_are_counted_where_they_belong():
    table = RegionTable()
    table.update(scored([1, 0], [0.2, 0.2], [0, 0]))  # whole cell; inside but no token; cut away by the crop
    counts, figures = RegionCounts.of(table.rows()), figures_of(table.rows(), NO_INTERVALS)
    assert (counts.regions, counts.regions_outside, counts.regions_without_token) == (3, 1, 1)
    assert (figures["align_px"].regions, figures["align_tokens"].regions) == (2, 1)
    assert math.isclose(figures["align_px"].value, (1 + 0.2 / 1.2) / 2, rel_tol=1e-12)
    assert figures["align_tokens"].value == figures["cosine"].value == 1
    assert math.isnan(figures["shuffled_cosine"].value)
    assert figures["shuffled_cosine"].regions == 0


def test_the_mean_over_regions_is_not_the_mean_over_images():
    table = RegionTable()
    table.update(scored([1, 0], [1, 0], [1, 0]))  # three hits
    table.update(scored([0, 1]))  # one miss
    table.update(scored())  # an image without regions
    counts, figures = RegionCounts.of(table.rows()), figures_of(table.rows(), NO_INTERVALS)
    assert (figures["align_px"].value, figures["align_px_per_image"].value) == (0.75, 0.5)
    assert (figures["cosine"].value, figures["cosine_per_image"].value) == (0.75, 0.5)
    assert (counts.images_with_regions, counts.regions, table.rows().images) == (2, 4, 3)


def test_no_region_at_all_gives_nan_not_zero():
    assert math.isnan(figures_of(RegionTable().rows(), NO_INTERVALS)["align_px"].value)


def test_rows_keep_their_image_label_and_area():
    table = RegionTable()
    table.update(scored(), [], [])
    table.update(scored([1, 0], [0, 0]), [4, 2], [10.0, 20.0])
    rows = table.rows()
    assert rows.image.tolist() == [1, 1]
    assert rows.label.tolist() == [4, 2]
    assert rows.area_px.tolist() == [10, 20]
    assert all(len(rows.scores[name]) == 2 for name in SCORES)
    sums, counts = rows.sums_per_image("iou_px")
    np.testing.assert_array_equal(sums, [0, 1])
    np.testing.assert_array_equal(counts, [0, 1])


def test_chosen_rows_keep_only_their_images():
    table = RegionTable()
    for regions in ([[1, 0]], [[0, 1]], [[0, 1], [1, 0]]):
        table.update(scored(*regions), range(len(regions)), [9.0] * len(regions))
    chosen = table.rows().chosen(np.array([0, 3]))
    assert (chosen.image.tolist(), chosen.images, chosen.label.tolist()) == ([0, 1], 2, [0, 1])
    assert chosen.scores["iou_px"].tolist() == [1, 1]
