"""Figures, intervals, breakdowns and differences against literal loops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from patch_aligned import intervals as bootstrap
from patch_aligned.analysis.regions import (
    FIGURES,
    SCORES,
    RegionRows,
    Resampling,
    differences,
    figures_by_label,
    figures_by_size,
    figures_of,
    rules_of,
)
from patch_aligned.intervals import percentile_interval, resampled_means

RESAMPLING = Resampling(resamples=300, seed=5)


def random_rows(seed: int, images: int = 12, regions: int = 40, undefined: float = 0.2) -> RegionRows:
    """Scores of regions that are spread over some of the images at random; some scores are undefined."""
    generator = np.random.default_rng(seed)
    scores = {name: generator.random(regions) for name in SCORES}
    for column in scores.values():
        column[generator.random(regions) < undefined] = np.nan
    image = np.sort(generator.integers(0, images - 2, regions))  # the last images have no regions
    return RegionRows(scores, image, generator.integers(0, 5, regions), generator.random(regions) * 20_000, images)


def literal_draws(rows: RegionRows, score: str, per_image: bool, drawn_images: list[int]) -> float:
    """The mean over the regions of the images drawn, region by region."""
    values = []
    for image in drawn_images:
        of_image = [v for v, i in zip(rows.scores[score], rows.image, strict=True) if i == image and not math.isnan(v)]
        if of_image:
            values += [sum(of_image) / len(of_image)] if per_image else of_image
    return sum(values) / len(values) if values else math.nan


@pytest.mark.parametrize("name", ["align_px", "cosine_per_image", "retrieval_top1"])
def test_values_and_intervals_equal_the_literal_bootstrap(name: str):
    rows = random_rows(1)
    score, per_image, _ = FIGURES[name]
    found = figures_of(rows, RESAMPLING, (name,))[name]
    with_scores = sorted({int(i) for i, v in zip(rows.image, rows.scores[score], strict=True) if not math.isnan(v)})
    generator = np.random.default_rng(RESAMPLING.seed)
    draws = [
        literal_draws(rows, score, per_image, [with_scores[place] for place in generator.integers(0, n, size=n)])
        for n in [len(with_scores)] * RESAMPLING.resamples
    ]
    assert found.value == pytest.approx(literal_draws(rows, score, per_image, with_scores), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), rel=1e-12)
    assert found.images == len(with_scores)
    assert found.regions == int((~np.isnan(rows.scores[score])).sum())


def test_draws_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch):
    sums, counts = np.random.default_rng(0).random((2, 7, 3))
    at_once = resampled_means(sums, counts, 50, 1)
    monkeypatch.setattr(bootstrap, "_ELEMENTS_AT_ONCE", 30)
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
    once = RegionRows(dict.fromkeys(SCORES, np.arange(8) / 8), np.arange(8), np.zeros(8), np.ones(8), 8)
    often = once.chosen(np.repeat(np.arange(8), 50))
    first, second = (figures_of(rows, RESAMPLING, ("align_px",))["align_px"] for rows in (once, often))
    assert (first.low, first.high) == pytest.approx((second.low, second.high), rel=1e-12)
    assert (first.regions, second.regions) == (8, 400)


def test_one_image_has_no_interval_and_none_has_no_value():
    one = random_rows(2, undefined=0).chosen(np.array([3]))
    figure = figures_of(one, RESAMPLING, ("align_px",))["align_px"]
    assert figure.value == one.scores["iou_px"][0]
    assert math.isnan(figure.low)
    none = one.chosen(np.array([], dtype=np.int64))
    figure = figures_of(none, RESAMPLING, ("align_px",))["align_px"]
    assert math.isnan(figure.value)
    assert (figure.regions, figure.images) == (0, 0)


def test_sizes_are_cocos_and_make_up_the_whole():
    rows = random_rows(3, undefined=0)
    rows = dataclasses.replace(rows, area_px=np.resize([1023.9, 1024, 9215, 9216], 40))
    by_size = figures_by_size(rows, RESAMPLING, ("align_px",))
    assert {name: figures["align_px"].regions for name, figures in by_size.items()} == {
        "small": 10, "medium": 20, "large": 10,
    }  # fmt: skip
    weighted = sum(figures["align_px"].value * figures["align_px"].regions for figures in by_size.values())
    assert weighted / 40 == pytest.approx(rows.scores["iou_px"].mean(), rel=1e-12)


def test_labels_come_by_frequency_each_with_its_own_mean():
    rows = random_rows(4)
    names = ["ash", "birch", "cedar", "date", "elm", "fir"]  # no region is a fir
    by_label = figures_by_label(rows, names, RESAMPLING, ("align_px", "cosine"))
    counts = np.bincount(rows.label, minlength=6)
    assert [counts[names.index(label)] for label in by_label] == sorted(counts[:5], reverse=True)
    assert "fir" not in by_label
    for label, figures in by_label.items():
        assert figures["cosine"].value == pytest.approx(
            np.nanmean(rows.scores["cosine"][rows.label == names.index(label)]), rel=1e-12
        )


def test_a_difference_is_taken_over_the_same_draws():
    """One projector is better by exactly 0.1 everywhere: unpaired intervals overlap, the paired one has no width."""
    rows = random_rows(6, undefined=0)
    better = dataclasses.replace(rows, scores={name: column + 0.1 for name, column in rows.scores.items()})
    found = differences(better, rows, RESAMPLING)["align_px"]
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1), rel=1e-9)
    assert found.share_above_zero == 1
    apart = [figures_of(side, RESAMPLING)["align_px"] for side in (better, rows)]
    assert apart[0].low < apart[1].high
    assert differences(rows, rows, RESAMPLING)["align_px"].share_above_zero == 0


def test_differences_of_other_images_are_refused():
    with pytest.raises(ValueError, match=r"40 regions in 12 images.*same set"):
        differences(random_rows(0), random_rows(1), RESAMPLING)


def test_every_figure_has_a_rule_with_the_settings_in_it():
    rules = rules_of("otsu", 0.25, 7, 80)
    assert rules.keys() == FIGURES.keys()
    assert "threshold otsu" in rules["align_px"]
    assert "0.25" in rules["pointing"]
    assert "80 labels" in rules["retrieval_top1"]
    assert not [rule for rule in rules.values() if "{" in rule]
