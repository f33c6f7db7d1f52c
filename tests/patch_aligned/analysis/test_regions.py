"""Metrics, intervals, breakdowns and differences of a frame of regions, against literal loops."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from patch_aligned import intervals
from patch_aligned.analysis.alignment import score_regions
from patch_aligned.analysis.regions import (
    HEADLINES,
    METRICS,
    SCORES,
    SIZES,
    Resampling,
    breakdowns,
    count_regions,
    differences,
    metrics_of,
    region_frame,
    rules_of,
)
from patch_aligned.intervals import percentile_interval, resampled_means

RESAMPLING = Resampling(resamples=300, seed=5)
NO_INTERVALS = Resampling(resamples=0)
TREES = ["ash", "birch", "cedar", "date", "elm", "fir"]


def frame(scores: dict[str, np.ndarray], image: np.ndarray, images: int, **columns: np.ndarray) -> pd.DataFrame:
    label = columns.get("label", np.zeros(len(image), dtype=np.int64))
    area_px = columns.get("area_px", np.ones(len(image)))
    return region_frame(image, images, label, TREES, area_px).assign(**scores)


def random_regions(seed: int, images: int = 12, regions: int = 40, undefined: float = 0.2) -> pd.DataFrame:
    """Scores of regions that are spread over some of the images at random; some scores are undefined."""
    generator = np.random.default_rng(seed)
    scores = {name: generator.random(regions) for name in SCORES}
    for column in scores.values():
        column[generator.random(regions) < undefined] = np.nan
    image = np.sort(generator.integers(0, images - 2, regions))  # the last images have no regions
    label, area_px = generator.integers(0, 5, regions), generator.random(regions) * 20_000
    return frame(scores, image, images, label=label, area_px=area_px)


def literal_draws(regions: pd.DataFrame, score: str, per_image: bool, drawn_images: list[int]) -> float:
    """The mean over the regions of the images drawn, region by region."""
    values = []
    for image in drawn_images:
        of_image = [
            v for v, i in zip(regions[score], regions["image"], strict=True) if i == image and not math.isnan(v)
        ]
        if of_image:
            values += [sum(of_image) / len(of_image)] if per_image else of_image
    return sum(values) / len(values) if values else math.nan


@pytest.mark.parametrize("name", ["align_px", "cosine_per_image", "retrieval_top1"])
def test_values_and_intervals_equal_the_literal_bootstrap(name: str):
    regions = random_regions(1)
    score, _, per_image = METRICS[name]
    found = metrics_of(regions, RESAMPLING, (name,)).loc[name]
    with_scores = sorted(set(regions["image"][regions[score].notna()]))
    generator = np.random.default_rng(RESAMPLING.seed)
    draws = [
        literal_draws(regions, score, per_image, [with_scores[index] for index in generator.integers(0, n, size=n)])
        for n in [len(with_scores)] * RESAMPLING.resamples
    ]
    assert found["value"] == pytest.approx(literal_draws(regions, score, per_image, with_scores), rel=1e-12)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), rel=1e-12)
    assert (found["images"], found["regions"]) == (len(with_scores), regions[score].notna().sum())


def test_draws_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch):
    sums, counts = np.random.default_rng(0).random((2, 7, 3))
    at_once = resampled_means(sums, counts, 50, 1)
    monkeypatch.setattr(intervals, "_ELEMENTS_AT_ONCE", 30)
    np.testing.assert_allclose(resampled_means(sums, counts, 50, 1), at_once, rtol=1e-12)


def test_the_interval_of_many_images_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3, 2, 4000)
    draws = resampled_means(values[:, None], np.ones((4000, 1)), 2000, 0)[:, 0]
    low, high = percentile_interval(draws)
    error = values.std() / math.sqrt(4000)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_images_are_drawn_not_regions():
    """Regions of an image are copies of each other here: a thousand of them say no more than one."""
    once = frame(dict.fromkeys(SCORES, np.arange(8) / 8), np.arange(8), 8)
    often = once.iloc[np.repeat(np.arange(8), 50)]
    first, second = (metrics_of(regions, RESAMPLING).loc["align_px"] for regions in (once, often))
    assert (first["low"], first["high"]) == pytest.approx((second["low"], second["high"]), rel=1e-12)
    assert (first["regions"], second["regions"]) == (8, 400)


def test_one_image_has_no_interval_and_none_has_no_value():
    one = random_regions(2, undefined=0).iloc[[3]]
    metric = metrics_of(one, RESAMPLING).loc["align_px"]
    assert metric["value"] == one["iou_px"].item()
    assert math.isnan(metric["low"])
    metric = metrics_of(one.iloc[:0], RESAMPLING).loc["align_px"]
    assert math.isnan(metric["value"])
    assert (metric["regions"], metric["images"]) == (0, 0)


def test_sizes_are_cocos_and_make_up_the_whole():
    area_px = np.resize([1023.9, 1024, 9215, 9216], 40)
    scores = {name: np.random.default_rng(3).random(40) for name in SCORES}
    regions = frame(scores, np.arange(40) // 4, 12, area_px=area_px)
    by_size = breakdowns(regions, RESAMPLING)["by_size"]
    counts = {name: metrics.loc["align_px", "regions"] for name, metrics in by_size.items()}
    assert counts == dict(zip(SIZES, (10, 20, 10), strict=True))
    weighted = sum(counts[name] * metrics.loc["align_px", "value"] for name, metrics in by_size.items())
    assert weighted / 40 == pytest.approx(regions["iou_px"].mean(), rel=1e-12)


def test_a_size_without_regions_is_listed():
    by_size = breakdowns(random_regions(3).query("area_px < 9216"), RESAMPLING)["by_size"]
    assert list(by_size) == list(SIZES)
    assert by_size["large"].loc["align_px", "regions"] == 0


def test_labels_come_by_frequency_each_with_its_own_mean():
    regions = random_regions(4)
    by_label = breakdowns(regions, RESAMPLING)["by_label"]
    counts = regions["label"].value_counts()
    assert [counts[label] for label in by_label] == sorted(counts[counts > 0], reverse=True)
    assert "fir" not in by_label  # no region is one
    for label, metrics in by_label.items():
        of_label = regions.loc[regions["label"] == label, "cosine"]
        assert metrics.loc["cosine", "value"] == pytest.approx(of_label.mean(), rel=1e-12)


def test_a_part_draws_only_its_own_images():
    regions = random_regions(4, undefined=0)
    part = regions[regions["label"] == "ash"]
    images, image = np.unique(part["image"].cat.codes, return_inverse=True)
    alone = frame({name: part[name].to_numpy() for name in SCORES}, image, len(images))
    assert breakdowns(regions, RESAMPLING)["by_label"]["ash"].equals(metrics_of(alone, RESAMPLING, HEADLINES))


def test_a_difference_is_taken_over_the_same_draws():
    """One projector is better by exactly 0.1 everywhere: unpaired intervals overlap, the paired one has no width."""
    regions = random_regions(6, undefined=0)
    better = regions.assign(**{name: regions[name] + 0.1 for name in SCORES})
    found = differences(better, regions, RESAMPLING).loc["align_px"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.1, 0.1, 0.1), rel=1e-9)
    assert found["share_above_zero"] == 1
    apart = [metrics_of(side, RESAMPLING).loc["align_px"] for side in (better, regions)]
    assert apart[0]["low"] < apart[1]["high"]
    assert differences(regions, regions, RESAMPLING).loc["align_px", "share_above_zero"] == 0


def test_differences_of_other_images_are_refused():
    with pytest.raises(ValueError, match=r"40 regions in 12 images.*same set"):
        differences(random_regions(0), random_regions(1), RESAMPLING)


def test_every_metric_has_a_rule_with_the_settings_in_it():
    rules = rules_of(threshold_rule="otsu", min_coverage=0.25, seed=7, label_count=80)
    assert rules.keys() == METRICS.keys()
    assert "threshold otsu" in rules["align_px"]
    assert "0.25" in rules["pointing"]
    assert "80 labels" in rules["retrieval_top1"]
    assert not [rule for rule in rules.values() if "{" in rule]


def scored(*coverage_of_images: list[list[float]]) -> pd.DataFrame:
    """Regions of the one label, which the first of two tokens shows; the coverage of both tokens for each region."""
    coverage = torch.tensor([region for image in coverage_of_images for region in image], dtype=torch.float64)
    own = torch.zeros(len(coverage), dtype=torch.int64)
    scores = score_regions(torch.eye(2), torch.tensor([[1.0, 0]]), own, coverage.reshape(-1, 2))
    image = np.repeat(np.arange(len(coverage_of_images)), [len(regions) for regions in coverage_of_images])
    return frame({name: values.numpy() for name, values in scores.items()}, image, len(coverage_of_images))


def test_regions_outside_or_without_token_are_counted_where_they_belong():
    regions = scored([[1, 0], [0.2, 0.2], [0, 0]])  # whole cell; inside but no token; cut away by the crop
    counts, metrics = count_regions(regions), metrics_of(regions, NO_INTERVALS)
    assert (counts["regions"], counts["regions_outside"], counts["regions_without_token"]) == (3, 1, 1)
    assert metrics.loc[["align_px", "align_tokens"], "regions"].tolist() == [2, 1]
    assert metrics.loc["align_px", "value"] == pytest.approx((1 + 0.2 / 1.2) / 2, rel=1e-12)
    assert metrics.loc[["align_tokens", "cosine"], "value"].tolist() == [1, 1]
    assert math.isnan(metrics.loc["shuffled_cosine", "value"])
    assert metrics.loc["shuffled_cosine", "regions"] == 0


def test_the_mean_over_regions_is_not_the_mean_over_images():
    regions = scored([[1, 0], [1, 0], [1, 0]], [[0, 1]], [])  # three hits, one miss, and an image without regions
    counts, metrics = count_regions(regions), metrics_of(regions, NO_INTERVALS)
    assert metrics.loc[["align_px", "align_px_per_image"], "value"].tolist() == [0.75, 0.5]
    assert metrics.loc[["cosine", "cosine_per_image"], "value"].tolist() == [0.75, 0.5]
    assert (counts["images_with_regions"], counts["regions"]) == (2, 4)


def test_no_region_at_all_gives_nan_not_zero():
    assert math.isnan(metrics_of(scored(), NO_INTERVALS).loc["align_px", "value"])
