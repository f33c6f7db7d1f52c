"""The first words of a report: which model aligns better and by how much, and the scale of its plot."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from patch_aligned.analysis import AnalysisSettings, MeasureSettings, analyse, load_models
from patch_aligned.analysis.report import PLOTTED, finding, lowest_of, report_markdown, report_page
from patch_aligned.analysis.run import Comparison
from patch_aligned.intervals import Resampling
from tests.patch_aligned.analysis.conftest import rectangle

NAN = float("nan")


def metrics(value: float, low: float = NAN, high: float = NAN) -> pd.DataFrame:
    return pd.DataFrame([{"value": value, "low": low, "high": high}] * len(PLOTTED), index=list(PLOTTED))


def analysis_of(aligns: dict[str, pd.DataFrame], *differences: tuple[str, str, pd.DataFrame]) -> Any:
    models = {name: SimpleNamespace(metrics=found, untrained=None) for name, found in aligns.items()}
    resampling = SimpleNamespace(confidence=0.9)
    comparisons = [Comparison(*difference) for difference in differences]
    return SimpleNamespace(models=models, comparisons=comparisons, settings=SimpleNamespace(resampling=resampling))


@pytest.mark.parametrize("is_later", [True, False])
def test_a_difference_is_told_from_the_better_models_side(is_later: bool) -> None:
    pair = ("good", "bad", metrics(0.1, 0.05, 0.2)) if is_later else ("bad", "good", metrics(-0.1, -0.2, -0.05))
    told = finding(analysis_of({"bad": metrics(0.2), "good": metrics(0.3)}, pair))
    assert told == "good aligns better than bad by 0.100 in Align(V, W) (90% interval 0.050 … 0.200)."


def test_an_interval_that_holds_0_tells_no_model_apart() -> None:
    told = finding(analysis_of({"a": metrics(0.2), "b": metrics(0.21)}, ("b", "a", metrics(0.01, -0.02, 0.04))))
    differ = "they differ by 0.010 in Align(V, W) (90% interval −0.020 … 0.040); the interval holds 0."
    assert told == f"b and a cannot be told apart: {differ}"


def test_of_several_models_the_best_is_compared_with_the_next() -> None:
    models = {"a": metrics(0.3), "blind": metrics(NAN), "b": metrics(0.2), "c": metrics(0.1)}
    pairs = [("b", "a", metrics(-0.1, -0.15, -0.05)), ("c", "a", metrics(-0.2, -0.3, -0.1))]
    assert finding(analysis_of(models, *pairs)).startswith("a aligns better than b, the next of 4 models, by 0.100 in")
    tied = [("b", "a", metrics(-0.1, -0.15, 0.05))]
    assert finding(analysis_of(models, *tied)).startswith(
        "a and b, the best of 4 models, cannot be told apart: they differ by"
    )


def test_one_model_stands_beside_another_regions_label_and_one_image_has_no_interval() -> None:
    told = finding(analysis_of({"a": metrics(0.3, 0.2, 0.4)}))
    assert told == (
        "a has an Align(V, W) of 0.300 (90% interval 0.200 … 0.400); with another region's label it has 0.300."
    )
    assert "of 0.300 (no interval: too few images)" in finding(analysis_of({"a": metrics(0.3)}))
    told = finding(analysis_of({"a": metrics(0.3), "b": metrics(0.2)}, ("b", "a", metrics(-0.1))))
    assert told.endswith("cannot be told apart: they differ by 0.100 in Align(V, W) (no interval: too few images).")


def test_the_scale_holds_0_and_all_values_with_their_intervals() -> None:
    assert lowest_of(analysis_of({"a": metrics(0.3, 0.2, 0.41), "b": metrics(NAN)})) == 0
    assert lowest_of(analysis_of({"a": metrics(0.3), "b": metrics(0, -0.11, 0.1)})) == -0.2


def test_the_page_begins_with_the_finding_and_places_dots_on_the_scale(write_pad: Callable) -> None:
    regions = [rectangle(12, 0, 40, 28, "dog"), rectangle(40, 28, 68, 56, "cup")]
    pad = write_pad(regions, regions[:1])
    models = load_models(("random=random:1", "start=train_init/mm_projector.bin"), "tiny-vicuna", "tiny-clip")
    measure = MeasureSettings(pad, pad.parent / "pictures", picture_rows=1)
    analysis = analyse(models, AnalysisSettings(measure, Resampling(30), (0, 1)))
    page = report_page(analysis, {}, "<svg>", None)
    assert page.index(finding(analysis)) < page.index('class="plot"') < page.index("<nav>")
    assert page.index('id="where-labels-are-found"') < page.index('id="three-measures"')
    assert finding(analysis) in report_markdown(analysis)
    first = lowest_of(analysis)
    centres = [float(place) for place in re.findall(r'<circle cx="([\d.]+)%"', page)]
    assert len(centres) == 5 * (2 + 1)  # measures, models and untrained ones
    value = analysis.models["start"].metrics.loc["align_px", "value"]
    assert centres[1] == pytest.approx(2 + 96 * (value - first) / (1 - first), abs=0.01)
    assert page.count('class="hollow"') == 5
