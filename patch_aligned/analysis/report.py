"""The report of an analysis: one HTML page, the headline as Markdown, every number as JSON, and the pictures."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from patch_aligned.analysis.localisation import (
    drawable,
    font_families,
    panel_jpegs,
    require_matplotlib,
    save_localisation_figure,
)
from patch_aligned.analysis.regions import HEADLINES, METRICS, SCORES_BY_NAME
from patch_aligned.analysis.run import Analysis, Entropy, Untrained, plain_json
from patch_aligned.analysis.token_map import map_panels, save_token_map_figures, write_token_map_page
from patch_aligned.analysis.words import TokenMaps
from patch_aligned.files import checkpoint_sha256, written_whole
from patch_aligned.models.base import VisionLanguageModel
from patch_aligned.tables import Cell, Table, number
from patch_aligned.web import jpeg_address, render

if TYPE_CHECKING:
    from matplotlib.lines import Line2D

PAPER_TABLE_3 = {
    "random": {"entropy_drop_nats": 0.0108, "align_px": 0.065, "cosine": 0.06},
    "LLaVA (captions only)": {"entropy_drop_nats": 2.7991, "align_px": 0.142, "cosine": 0.07},
    "patch-aligned": {"entropy_drop_nats": 3.8352, "align_px": 0.279, "cosine": 0.56},
}
"""The paper's Table 3: CLIP-L/336, Vicuna-1.5-7B and a two-layer MLP, on 100 images of COCO 2017."""

PAPER_ENTROPY_BEFORE_NATS = 4.8353
"""The paper's Table 1: entropy of CLIP-L/336's features on 100 images of COCO 2017."""

PAPER_CONDITIONS = (
    "CLIP-L/336, Vicuna-1.5-7B, two-layer MLP, 100 images of COCO 2017. H after is H before, from the paper's Table 1, "
    "less ΔH."
)

PLOTTED = {
    "align_px": "Align(V, W)", "shuffled_align_px": "Align, other label", "cosine": "cosine", "contrast": "contrast",
    "retrieval_top1": "retrieval@1", "name_auc": "names: AUC",
}  # fmt: skip
"""Metrics between −1 and 1 that share a scale."""

MOST_LABELS = 20
MOST_BROKEN_IMAGES = 20
MOST_LAYOUTS = 3
"""What the page lists of labels, of images left out and of grids; the JSON has all."""

ON_PAGE = tuple(name for name, metric in METRICS.items() if not metric.score.startswith("iou_px_"))
"""Metrics that the page shows; the JSON also has those under each threshold rule."""


def write_report(
    analysis: Analysis, folder: Path, maps: TokenMaps | None = None, provenance: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write `report.html`, `report.md`, `analysis.json` and the pictures into a folder, instead of an earlier report.

    Args:
        analysis: the numbers.
        folder: where everything goes; it is made if missing.
        maps: token maps of some images, for the page and for `token_map.html`.
        provenance: what else the numbers depend on, such as `provenance_of` gives.

    Returns:
        The paths written, the page first.

    Raises:
        ImportError: matplotlib is not installed.
    """
    provenance = provenance or {}
    folder.mkdir(parents=True, exist_ok=True)
    beside = {"provenance": provenance, "paper_table_3_at_7b_scale": PAPER_TABLE_3}
    document = {**analysis.to_json(), **plain_json(beside)}
    _write_text(folder / "analysis.json", json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))
    _write_text(folder / "report.md", report_markdown(analysis))
    require_matplotlib()
    spectra = folder / "spectra.svg"
    save_spectra_figure(analysis, spectra)
    _write_text(folder / "report.html", report_page(analysis, provenance, spectra.read_text(encoding="utf-8"), maps))
    pictures = [spectra]  # the numbers are written first, so that a failing picture costs no analysis
    if analysis.picture:
        pictures.append(folder / "localisation.png")
        save_localisation_figure(analysis.picture, pictures[-1], analysis.settings.measure.threshold_rule)
    if maps:
        pictures += [*write_token_map_page(maps, folder), *save_token_map_figures(maps, folder, prefix="token_map_")]
    patterns = ("localisation.png", "token_map.html", "token_map.json", "token_map_[0-9][0-9][0-9]_*.png")
    for earlier in {path for pattern in patterns for path in folder.glob(pattern)} - set(pictures):
        earlier.unlink()  # or it would pass for this analysis's
    return [*(folder / name for name in ("report.html", "report.md", "analysis.json")), *pictures]


def _write_text(path: Path, text: str) -> None:
    with written_whole(path) as file:
        file.write_text(text.rstrip() + "\n", encoding="utf-8")


def provenance_of(models: Sequence[VisionLanguageModel]) -> dict[str, Any]:
    """Return device, versions, and the SHA-256 of all weights in local files, by their path."""
    return {
        "device": models[0].encoder.device,
        "dtype": "float32",
        "image_aspect_ratio": ", ".join(sorted({model.encoder.image_aspect_ratio for model in models})),
        "versions": {name: version(name) for name in ("patch-aligned-llava", "torch", "transformers")},
        "sha256": {source: checkpoint_sha256(source) for source in local_sources(models)},
    }


def local_sources(models: Sequence[VisionLanguageModel]) -> list[str]:
    """Return the local files and folders that projectors, towers and word embeddings are from."""
    sources = {source for model in models for source in (model.source, model.encoder.name, model.words.source)}
    return sorted(source for source in sources if Path(source).exists())


def finding(analysis: Analysis) -> str:
    """Say which model has the highest Align, and by how much it exceeds the next one's, with the paired interval."""
    aligns = {name: model.metrics.loc["align_px"] for name, model in analysis.models.items()}
    best, *others = sorted(aligns, key=lambda name: -np.nan_to_num(aligns[name]["value"], nan=-1))
    if not others:
        other_label = number(analysis.models[best].metrics.loc["shuffled_align_px", "value"])
        value, interval = number(aligns[best]["value"]), _in_brackets(analysis, *aligns[best][["low", "high"]])
        return f"{best} has an Align(V, W) of {value}{interval}; with another region's label it has {other_label}."
    pair = next(pair for pair in analysis.comparisons if {pair.first, pair.second} == {best, others[0]})
    sign = 1 if pair.first == best else -1
    value, *ends = (sign * pair.metrics.loc["align_px", name] for name in ("value", "low", "high"))
    low, high = sorted(ends)
    among = f" of {len(aligns)} models" if len(others) > 1 else ""
    gap = f"{number(value)} in Align(V, W){_in_brackets(analysis, low, high)}"
    if low > 0:
        return f"{best} aligns better than {others[0]}{among and f', the next{among},'} by {gap}."
    holds = "; the interval holds 0" if high >= 0 else ""
    return f"{best} and {others[0]}{among and f', the best{among},'} cannot be told apart: they differ by {gap}{holds}."


def _in_brackets(analysis: Analysis, low: float, high: float) -> str:
    if math.isnan(low):
        return " (no interval: too few images)"
    return f" ({analysis.settings.resampling.confidence:.0%} interval {number(low)} … {number(high)})"


def lowest_of(analysis: Analysis) -> float:
    """Return where a scale up to 1 begins that holds 0 and the plotted metrics with their intervals, in tenths."""
    lows = [model.metrics.loc[list(PLOTTED), ["value", "low"]].min().min() for model in analysis.models.values()]
    return min(0, math.floor(10 * np.nanmin(lows))) / 10


_HEADLINE_DIGITS = {"align_px": 3, "cosine": 2, "shuffled_cosine": 2}
_HEALTH_DIGITS = {"shuffled_align_px": 3, "contrast": 2, "retrieval_top1": 2, "best_word_cosine": 2}
_PAPER_COLUMNS = ("Projector", "H before", "H after", "ΔH", "Align(V, W)", "cosine")


def headline_table(analysis: Analysis) -> Table:
    """Table 3 of the paper, with the cosine with wrong labels as a control."""
    rows = []
    for name, model in analysis.models.items():
        entropies = (model.entropy_before.entropy_nats, model.entropy_after.entropy_nats, model.entropy_drop_nats)
        rows.append([Cell(name), *map(Cell, map(number, entropies)), *_cells(model.metrics, _HEADLINE_DIGITS)])
    for name, before_nats, untrained in _untrained(analysis):
        metrics = _cells(untrained.metrics, _HEADLINE_DIGITS)
        rows.append([*_entropies_of_untrained(name, before_nats, untrained), *metrics])
    title = f"{analysis.images:,} images, threshold rule {analysis.settings.measure.threshold_rule}"
    return Table(title, (*_PAPER_COLUMNS, "cosine, shuffled labels"), rows)


def health_table(analysis: Analysis) -> Table:
    """What tells alignment from collapse, beside Align and cosine; the floor is the cosine of a constant vector."""
    rows = [
        [Cell(name), *_cells(model.metrics, _HEALTH_DIGITS), Cell(number(model.cosine_floor, 2))]
        for name, model in analysis.models.items()
    ]
    for name, _, untrained in _untrained(analysis):
        rows.append([Cell(name), *_cells(untrained.metrics, _HEALTH_DIGITS), Cell("")])
    columns = ("Align, other label", "contrast", "retrieval@1", "best word", "floor")
    return Table("Own label against others", ("Projector", *columns), rows)


def names_table(analysis: Analysis) -> Table | None:
    """Name scores, and names in captions; None if no LLM was run."""
    rows = [
        [
            Cell(name),
            *_cells(model.metrics, dict.fromkeys(SCORES_BY_NAME, 2)),
            *_cells(model.names.captions, {"precision": 2, "recall": 2, "f1": 2}),
        ]
        for name, model in analysis.models.items()
        if model.names
    ]
    columns = ("bound", "information", "AUC", "captions: precision", "recall", "F1")
    return Table("Names that the LLM reads, nats", ("Projector", *columns), rows) if rows else None


def paper_table() -> Table:
    """Table 3 of the paper, in the columns of `headline_table`."""
    before = PAPER_ENTROPY_BEFORE_NATS
    rows = []
    for name, row in PAPER_TABLE_3.items():
        drop = row["entropy_drop_nats"]
        values = [*map(number, (before, before - drop, drop, row["align_px"])), number(row["cosine"], 2)]
        rows.append([Cell(name), *map(Cell, values)])
    return Table("The paper's Table 3", _PAPER_COLUMNS, rows)


def entropy_table(analysis: Analysis) -> Table:
    """Entropies and effective ranks before and after, Table 1 of the paper."""
    rows: list[list[Cell]] = []
    for name, model in analysis.models.items():
        before, after = model.entropy_before, model.entropy_after
        entropies = [
            Cell(number(entropy.entropy_nats), f"of at most {number(math.log(entropy.width), 2)}")
            for entropy in (before, after)
        ]
        ranks = [Cell(number(entropy.effective_rank, 1), f"of {entropy.width}") for entropy in (before, after)]
        rows.append([Cell(name), *entropies, Cell(number(model.entropy_drop_nats)), *ranks, Cell(f"{after.tokens:,}")])
    for name, before_nats, untrained in _untrained(analysis):
        ranks = [Cell(number(math.exp(before_nats), 1)), _cell(untrained.effective_rank_after, 1)]
        rows.append([*_entropies_of_untrained(name, before_nats, untrained), *ranks, Cell("")])
    ranks_of = ("effective rank before", "effective rank after")
    return Table("Entropy", ("Projector", "H before", "H after", "ΔH", *ranks_of, "visual tokens"), rows)


def metrics_table(analysis: Analysis) -> Table:
    """Every metric with its rule, a row each, and the projectors side by side."""
    untrained = {name: found for name, _, found in _untrained(analysis)}
    metrics = [*(found.metrics for found in analysis.models.values()), *(found.metrics for found in untrained.values())]
    rows = [
        [Cell(name, analysis.rules[name]), *(_cell(of_model.loc[name]) for of_model in metrics)]
        for name in measured_of(analysis, ON_PAGE)
    ]
    return Table("Every metric", ("Metric", *analysis.models, *untrained), rows)


def differences_table(analysis: Analysis) -> Table:
    """The headline metrics of each pair of projectors, the later less the earlier."""
    shown = measured_of(analysis, HEADLINES)
    rows = [
        [Cell(f"{pair.first} − {pair.second}"), *_cells(pair.metrics, dict.fromkeys(shown, 3))]
        for pair in analysis.comparisons
    ]
    return Table("Differences", ("Difference", *shown), rows)


def measured_of(analysis: Analysis, names: Sequence[str]) -> list[str]:
    """Those of the metrics that some model has: name scores are undefined where no LLM was run."""
    return [n for n in names if any(not math.isnan(m.metrics.loc[n, "value"]) for m in analysis.models.values())]


def breakdown_table(analysis: Analysis, by: str, title: str, part: str) -> Table:
    """Align, cosine and the name scores `by_size`, `by_label` or `by_caption`; parts are the first model's."""
    models: dict[str, dict[str, pd.DataFrame]] = {name: getattr(of, by) for name, of in analysis.models.items()}
    shown = ["align_px", "cosine"]
    if any(metrics.loc["name_bound", "regions"] for parts in models.values() for metrics in parts.values()):
        shown += ["name_bound", "name_auc"]
    first = next(iter(models.values()))
    rows = [
        [
            Cell(name),
            Cell(f"{int(metrics.loc['align_px', 'regions']):,}"),
            *(_cell(parts[name].loc[metric], 2) for metric in shown for parts in models.values()),
        ]
        for name, metrics in list(first.items())[:MOST_LABELS]
    ]
    return Table(title, (part, "regions", *(f"{metric}, {name}" for metric in shown for name in models)), rows)


def counts_table(analysis: Analysis) -> Table:
    """What each projector's metrics count, and what they leave out."""
    columns = {
        "images_with_regions": "images with regions",
        "images_without_token": "of them without covered token",
        "regions": "regions",
        "regions_outside": "outside the model's image",
        "regions_without_token": "inside, but without covered token",
    }
    rows = [
        [Cell(name), *(Cell(f"{model.counts[column]:,}") for column in columns)]
        for name, model in analysis.models.items()
    ]
    return Table("Regions", ("Projector", *columns.values()), rows)


def sources_table(analysis: Analysis, hashes: Mapping[str, str]) -> Table:
    """Where weights, features and words come from, with the beginning of their SHA-256."""

    def source(path: str) -> Cell:
        return Cell(path, f"SHA-256 {hashes[path][:16]}" if path in hashes else "")

    rows = []
    for name, model in analysis.models.items():
        grids, others = ", ".join(list(model.layouts)[:MOST_LAYOUTS]), len(model.layouts) - MOST_LAYOUTS
        more = Cell(f"{grids} and {others} more" if others > 0 else grids)
        rows.append([Cell(name), *map(source, (model.source, model.tower, model.words)), more])
    return Table("Models", ("Projector", "weights", "vision tower", "word embeddings", "grid"), rows)


def _cell(metric: Mapping[str, float] | pd.Series, digits: int = 3) -> Cell:
    """A value with its interval, or a mean with its standard deviation."""
    if "sd" in metric:
        spread = "" if math.isnan(metric["sd"]) else f"± {number(metric['sd'], digits)}"
        return Cell(number(metric["mean"], digits), spread)
    low, high = (number(metric[end], digits) for end in ("low", "high"))
    return Cell(number(metric["value"], digits), "" if math.isnan(metric["low"]) else f"{low} … {high}")


def _cells(metrics: pd.DataFrame, digits_of: Mapping[str, int]) -> list[Cell]:
    return [_cell(metrics.loc[name], digits) for name, digits in digits_of.items()]


def _entropies_of_untrained(name: str, before_nats: float, untrained: Untrained) -> list[Cell]:
    """The beginning of a row of untrained projectors: name, entropies before and after, and their difference."""
    seeds = f"± sd, {len(untrained.seeds)} seeds" if len(untrained.seeds) > 1 else "1 seed"
    after = (untrained.entropy_after_nats, untrained.entropy_drop_nats)
    return [Cell(name, seeds), Cell(number(before_nats)), *map(_cell, after)]


def _untrained(analysis: Analysis) -> list[tuple[str, float, Untrained]]:
    """Name, entropy before and numbers of the untrained projectors; models of one shape share theirs."""
    of_shape: dict[int, tuple[str, float, Untrained]] = {}
    for name, model in analysis.models.items():
        if model.untrained is not None and id(model.untrained) not in of_shape:
            of_shape[id(model.untrained)] = (name, model.entropy_before.entropy_nats, model.untrained)
    title = "untrained" if len(of_shape) == 1 else "untrained, as {}"
    return [(title.format(name), before, found) for name, before, found in of_shape.values()]


def report_page(analysis: Analysis, provenance: Mapping[str, Any], spectra_svg: str, maps: TokenMaps | None) -> str:
    """Render the page."""
    measure, resampling = analysis.settings.measure, analysis.settings.resampling
    subset = "all" if measure.limit is None else f"{measure.subset}, {measure.limit:,}"
    settings = {
        "data": f"{measure.data}, format {analysis.data_format}",
        "images": f"{measure.image_folder}, {subset}",
        "regions": measure.region_kind or "all",
        "a region is": f"an annotated {measure.region_unit}" if measure.region_unit == "instance" else "all of a label",
        "threshold rule": measure.threshold_rule + (", never below 0" if measure.positive_threshold else ""),
        "a token is covered from": f"{measure.min_coverage} of its cell",
        "seed": f"{measure.seed}: shuffled labels, random subset, bootstrap",
        "intervals": f"{resampling.confidence:.0%}, {resampling.resamples:,} resamples of images; one training run",
        "untrained projectors": f"seeds {', '.join(map(str, analysis.settings.untrained_seeds)) or 'none'}",
        **{key: str(value) for key, value in provenance.items() if key not in ("sha256", "versions")},
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items()),
        "speed": f"{analysis.images_per_second:.1f} images a second, all projectors together",
    }
    told_apart = all(model.by_caption for model in analysis.models.values())
    return render(
        __package__,
        "report.html.j2",
        title=f"Analysis: {', '.join(analysis.models)}",
        analysis=analysis,
        measure=measure,
        confidence=f"{resampling.confidence:.0%}",
        regions=max(model.counts["regions"] for model in analysis.models.values()),
        finding=finding(analysis),
        plotted={metric: PLOTTED[metric] for metric in measured_of(analysis, tuple(PLOTTED))},
        lowest=lowest_of(analysis),
        colours=colours_of(analysis),
        untrained=_untrained(analysis),
        headline=headline_table(analysis),
        health=health_table(analysis),
        names=names_table(analysis),
        asked=analysis.settings.names,
        paper=paper_table(),
        paper_conditions=PAPER_CONDITIONS,
        entropy=entropy_table(analysis),
        spectra=Markup(spectra_svg[spectra_svg.index("<svg") :]),
        metrics=metrics_table(analysis),
        differences=differences_table(analysis),
        sizes=breakdown_table(analysis, "by_size", "Sizes", "Size"),
        captions=breakdown_table(analysis, "by_caption", "Captions", "Region") if told_apart else None,
        labels=breakdown_table(analysis, "by_label", "Labels", "Label"),
        most_labels=MOST_LABELS,
        picture=[
            (row, {key: jpeg_address(jpeg) for key, jpeg in panel_jpegs(row).items()}) for row in analysis.picture
        ],
        maps=maps,
        map_panels=map_panels,
        counts=counts_table(analysis),
        most_broken_images=MOST_BROKEN_IMAGES,
        sources=sources_table(analysis, provenance.get("sha256", {})),
        settings={key: value for key, value in settings.items() if value},
        number=number,
    )


def report_markdown(analysis: Analysis) -> str:
    """Render the headline table, what it was taken on, and the paper's Table 3."""
    measure = analysis.settings.measure
    first, model = next(iter(analysis.models.items()))
    counts, names = model.counts, names_table(analysis)
    kind = f" of kind `{measure.region_kind}`" if measure.region_kind else ""
    outside = (
        f"{counts['regions_outside']} outside the model's image and left out, " if counts["regions_outside"] else ""
    )
    broken = (
        f" {len(analysis.broken_images):,} more images were left out: they could not be measured."
        if analysis.broken_images
        else ""
    )
    differing = f" (of {first}; the page has the counts of all)" if analysis.counts_differ else ""
    lines = [
        "# Analysis of projectors",
        "",
        finding(analysis),
        "",
        headline_table(analysis).markdown(),
        "",
        f"{analysis.images} images, {counts['regions']} regions{kind}: {outside}{counts['regions_without_token']} "
        f"cover no token and count in Align alone{differing}.{broken}",
        "Entropies H in nats; ΔH is before minus after. Align is the mean over regions of the IoU by area, with the "
        f"threshold rule `{measure.threshold_rule}`. The last column is a control: the same cosine with another "
        f"region's label (seed {measure.seed}). In brackets {analysis.settings.resampling.confidence:.0%} intervals, "
        "by the bootstrap over images: they hold for this training run, not for another seed of training.",
        "",
        health_table(analysis).markdown(),
        "",
        "Align, other label: the same control for Align. Contrast: the cosine less the mean over all other labels. "
        f"Retrieval@1: own label nearest of all {analysis.labels}. Best word: cosine with the nearest word of the LLM. "
        "Floor: the cosine that the best constant vector has with the labels.",
        *(["", names.markdown(), "", f"Names: {analysis.rules['name_bound']}."] if names else []),
        "",
        "## The paper's Table 3, at 7B scale",
        "",
        "Other models, other images: what can be compared is the order of the rows, not the numbers.",
        "",
        paper_table().markdown(),
        "",
        PAPER_CONDITIONS,
    ]
    return "\n".join(lines)


_LONGEST_NAME = 60  # characters
_COLOURS = ("#868e96", "#1c7ed6", "#e8590c", "#2f9e44", "#ae3ec9", "#e03131", "#0c8599", "#f08c00")
_THINNEST, _THICKEST, _STEP = 1.4, 5.6, 1.4  # widths of lines, points
_LOWEST = 1e-9  # shares below it are rounding


def colours_of(analysis: Analysis) -> dict[str, str]:
    """The colour of each model in plots."""
    return dict(zip(analysis.models, itertools.cycle(_COLOURS), strict=False))


def save_spectra_figure(analysis: Analysis, path: Path) -> None:
    """Plot the eigenvalues of every entropy, both axes logarithmic, as SVG; a shared tower is plotted once.

    Of several towers each is dashed in the colour of its first model.
    """
    import matplotlib
    from matplotlib.figure import Figure

    towers: dict[str, tuple[str, Entropy]] = {}
    for name, model in analysis.models.items():
        towers.setdefault(model.tower, (name, model.entropy_before))
    colours = colours_of(analysis)
    height = 3.6 + 0.2 * (len(towers) + len(analysis.models))  # inches, of them 0.2 a line of the legend
    figure = Figure(figsize=(6.2, height), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    lines: list[Line2D] = []
    labels: list[str] = []

    def draw(entropy: Entropy, name: str, **style: Any) -> None:
        shares = [share for share in entropy.spectrum if share > _LOWEST]
        lines.extend(axes.plot(range(1, len(shares) + 1), shares, **style))
        labels.append(f"{drawable(name, _LONGEST_NAME)}: effective rank {entropy.effective_rank:.1f}")

    for name, entropy in towers.values():
        shown, colour = ("before", "#212529") if len(towers) == 1 else (f"before {name}", colours[name])
        draw(entropy, shown, color=colour, linestyle="--", linewidth=_THINNEST, zorder=9)
    for index, (name, model) in enumerate(analysis.models.items()):
        # Each line is thinner than the one before: those of alike projectors coincide, and both must show.
        width = min(_THINNEST + _STEP * (len(analysis.models) - 1 - index), _THICKEST)
        draw(model.entropy_after, name, color=colours[name], linewidth=width)
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
