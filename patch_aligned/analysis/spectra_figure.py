"""Spectra before and after projectors in one picture: how fast the shares of the directions fall."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_aligned.analysis.analysis_results import Analysis, EntropyFigures
from patch_aligned.analysis.figure_parts import drawable, font_families

if TYPE_CHECKING:
    from matplotlib.lines import Line2D

_LONGEST_NAME = 60  # characters
_COLOURS = ("#868e96", "#1c7ed6", "#e8590c", "#2f9e44", "#ae3ec9", "#e03131", "#0c8599", "#f08c00")
_THINNEST, _THICKEST, _STEP = 1.4, 5.6, 1.4  # widths of lines, points
_LOWEST = 1e-9  # shares below it are rounding


def save_spectra_figure(analysis: Analysis, path: Path) -> None:
    """Draws the eigenvalues of every entropy, both axes logarithmic, and saves an SVG.

    Args:
        analysis: whose spectra to draw; towers that several models share are drawn once.
        path: where the picture goes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The spectra need matplotlib: pip install 'patch-aligned-llava[analysis]'.") from error

    towers: dict[str, tuple[str, EntropyFigures]] = {}
    for name, model in analysis.models.items():
        towers.setdefault(model.tower, (name, model.entropy_before))
    height = 3.6 + 0.2 * (len(towers) + len(analysis.models))  # inches, of them 0.2 a line of the legend
    figure = Figure(figsize=(6.2, height), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    lines: list[Line2D] = []
    labels: list[str] = []

    def draw(entropy: EntropyFigures, name: str, **style: Any) -> None:
        shares = [share for share in entropy.spectrum if share > _LOWEST]
        lines.extend(axes.plot(range(1, len(shares) + 1), shares, **style))
        labels.append(f"{drawable(name, _LONGEST_NAME)}: effective rank {entropy.effective_rank:.1f}")

    for name, entropy in towers.values():
        shown = "before" if len(towers) == 1 else f"before {name}"
        draw(entropy, shown, color="#212529", linestyle="--", linewidth=_THINNEST, zorder=9)
    for place, (name, model) in enumerate(analysis.models.items()):
        # Each line is thinner than the one before: those of alike projectors coincide, and both must show.
        width = min(_THINNEST + _STEP * (len(analysis.models) - 1 - place), _THICKEST)
        draw(model.entropy_after, name, color=_COLOURS[place % len(_COLOURS)], linewidth=width)
    axes.set(xscale="log", yscale="log", xlabel="direction, by its share", ylabel="share of the tokens' energy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    # Named here and not at each line: matplotlib leaves out lines whose name starts with an underscore.
    legend = figure.legend(
        lines, labels, loc="outside lower center", frameon=False, prop={"family": font_families(), "size": 9.5}
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    # The same numbers give the same file: names of its parts from a fixed salt, and no date.
    with matplotlib.rc_context({"svg.hashsalt": "spectra"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
