"""Spectra before and after projectors in one picture: how fast the shares of the directions fall."""

from __future__ import annotations

from pathlib import Path

from patch_aligned.analysis.analysis_results import Analysis, EntropyFigures

_COLOURS = ("#868e96", "#1c7ed6", "#e8590c", "#2f9e44", "#ae3ec9", "#e03131", "#0c8599", "#f08c00")
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
    lines = len(towers) + len(analysis.models)
    figure = Figure(figsize=(6.2, 3.6 + 0.2 * lines), facecolor="white", layout="constrained")
    axes = figure.add_subplot()

    def draw(entropy: EntropyFigures, name: str, colour: str, line: str) -> None:
        shares = [share for share in entropy.spectrum if share > _LOWEST]
        label = f"{name}: effective rank {entropy.effective_rank:.1f}"
        axes.plot(range(1, len(shares) + 1), shares, line, color=colour, linewidth=1.8, label=label)

    for name, entropy in towers.values():
        draw(entropy, "before" if len(towers) == 1 else f"before {name}", "#212529", "--")
    for place, (name, model) in enumerate(analysis.models.items()):
        draw(model.entropy_after, name, _COLOURS[place % len(_COLOURS)], "-")
    axes.set(xscale="log", yscale="log", xlabel="direction, by its share", ylabel="share of the tokens' energy")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9.5)
    # The same numbers give the same file: names of its parts from a fixed salt, and no date.
    with matplotlib.rc_context({"svg.hashsalt": "spectra"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
