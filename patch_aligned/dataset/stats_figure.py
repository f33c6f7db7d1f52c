"""The statistics as a picture: tags, regions an image, sizes of masks, covered tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patch_aligned.dataset.stats import TAGS_SHOWN, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _RED, _INK = "#3b6fb6", "#d9480f", "#202124"
_LONGEST_TAG = 24
_MOST_REGIONS = 20


def save_statistics_figure(statistics: Statistics, path: Path) -> None:
    """Draws four panels and saves them as an image of the kind that the suffix names.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _draw_tags(axes[0, 0], statistics)
    _draw_regions_per_image(axes[0, 1], statistics)
    _draw_mask_shares(axes[1, 0], statistics)
    _draw_tokens(axes[1, 1], statistics)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    title = f"{statistics.file.name}: {statistics.images:,} images, {statistics.regions:,} regions, "
    figure.suptitle(_plain(f"{title}{len(statistics.tags):,} tags"), color=_INK)
    figure.savefig(path, dpi=120)


def _draw_tags(axis: Axes, statistics: Statistics) -> None:
    top = statistics.tags.most_common(TAGS_SHOWN)[::-1]
    names = [tag if len(tag) <= _LONGEST_TAG else f"{tag[: _LONGEST_TAG - 1]}…" for tag, _ in top]
    places = range(len(top))
    axis.barh(places, [count for _, count in top], color=_BLUE)
    axis.set_yticks(places, [_plain(name) for name in names], fontsize=8)
    axis.set_xlabel("regions")
    axis.set_title("The most frequent tags", loc="left", fontsize=11)


def _draw_regions_per_image(axis: Axes, statistics: Statistics) -> None:
    numbers = range(_MOST_REGIONS + 1)
    heights = [statistics.regions_per_image[number] for number in numbers]
    heights[-1] = sum(count for number, count in statistics.regions_per_image.items() if number >= _MOST_REGIONS)
    last = max((number for number in numbers if heights[number]), default=0)
    axis.bar(numbers[: last + 1], heights[: last + 1], color=_BLUE)
    if last == _MOST_REGIONS:
        axis.set_xticks([*range(0, _MOST_REGIONS, 5), _MOST_REGIONS], ["0", "5", "10", "15", f"{_MOST_REGIONS}+"])
    else:
        axis.set_xticks(numbers[: last + 1])
    axis.set_xlabel("regions of an image")
    axis.set_ylabel("images")
    axis.set_title("Regions per image", loc="left", fontsize=11)


def _draw_mask_shares(axis: Axes, statistics: Statistics) -> None:
    shares = np.asarray(statistics.area_shares, dtype=np.float64)
    axis.hist(100 * shares, bins=list(np.linspace(0, max(100 * shares.max(initial=0.0), 1.0), 41)), color=_BLUE)
    axis.set_xlabel("mask, per cent of the image")
    axis.set_ylabel("regions")
    axis.set_title("Sizes of masks", loc="left", fontsize=11)


def _draw_tokens(axis: Axes, statistics: Statistics) -> None:
    covered = np.asarray(statistics.covered_tokens)
    grid = statistics.tokens.grid
    edges = np.concatenate(([0], np.unique(np.geomspace(1, grid * grid + 1, 25).round())))
    counts, _ = np.histogram(covered, bins=edges)
    places = np.arange(len(counts))
    axis.bar(places, counts, color=[_RED, *[_BLUE] * (len(counts) - 1)])
    shown = [0, *range(1, len(counts), 4)]
    axis.set_xticks(shown, [f"{int(edges[place])}" for place in shown])
    share = statistics.regions_without_token / max(statistics.regions, 1)
    aspect = statistics.tokens.image_aspect_ratio
    axis.set_xlabel(f"covered tokens, from, of {grid} × {grid} ({aspect}); red: none")
    axis.set_ylabel("regions")
    axis.set_title(f"Tokens that regions cover; {share:.1%} cover none", loc="left", fontsize=11)


def _plain(text: str) -> str:
    """Any text without a meaning to matplotlib's mathtext."""
    return text.replace("$", r"\$")
