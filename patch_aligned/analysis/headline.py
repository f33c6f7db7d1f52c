"""What an analysis found: in one sentence, and as dots on one scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from patch_aligned.tables import number

if TYPE_CHECKING:
    from patch_aligned.analysis.run import Analysis

PLOTTED = {
    "align_px": "Align(V, W)", "shuffled_align_px": "Align, other label", "cosine": "cosine", "contrast": "contrast",
    "retrieval_top1": "retrieval@1", "name_auc": "names: AUC",
}  # fmt: skip
"""Metrics between −1 and 1 that share a scale."""


def finding(analysis: Analysis) -> str:
    """Say which model has the highest Align, and by how much it exceeds the next one's, with the paired interval."""
    aligns = {name: model.metrics.loc["align_px"] for name, model in analysis.models.items()}
    best, *others = sorted(aligns, key=lambda name: -np.nan_to_num(aligns[name]["value"], nan=-1))
    if not others:
        other_label = number(analysis.models[best].metrics.loc["shuffled_align_px", "value"])
        value, interval = number(aligns[best]["value"]), _interval(analysis, *aligns[best][["low", "high"]])
        return f"{best} has an Align(V, W) of {value}{interval}; with another region's label it has {other_label}."
    pair = next(pair for pair in analysis.comparisons if {pair.first, pair.second} == {best, others[0]})
    sign = 1 if pair.first == best else -1
    value, *ends = (sign * pair.metrics.loc["align_px", name] for name in ("value", "low", "high"))
    low, high = sorted(ends)
    among = f" of {len(aligns)} models" if len(others) > 1 else ""
    gap = f"{number(value)} in Align(V, W){_interval(analysis, low, high)}"
    if low > 0:
        return f"{best} aligns better than {others[0]}{among and f', the next{among},'} by {gap}."
    holds = "; the interval holds 0" if high >= 0 else ""
    return f"{best} and {others[0]}{among and f', the best{among},'} cannot be told apart: they differ by {gap}{holds}."


def _interval(analysis: Analysis, low: float, high: float) -> str:
    if math.isnan(low):
        return " (no interval: too few images)"
    return f" ({analysis.settings.resampling.confidence:.0%} interval {number(low)} … {number(high)})"


def lowest_of(analysis: Analysis) -> float:
    """Return where a scale up to 1 begins that holds 0 and the plotted metrics with their intervals, in tenths."""
    lows = [model.metrics.loc[list(PLOTTED), ["value", "low"]].min().min() for model in analysis.models.values()]
    return min(0, math.floor(10 * np.nanmin(lows))) / 10
