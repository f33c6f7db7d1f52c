"""A report's page: one HTML file that holds its tables and pictures, runs no script and loads nothing."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from patch_aligned.analysis.alignment import THRESHOLD_RULES
from patch_aligned.analysis.localisation import drawable, font_families, panel_jpegs, save_localisation_figure
from patch_aligned.analysis.regions import FIGURES, HEADLINES, Difference, Figure
from patch_aligned.analysis.run import Analysis, EntropyFigures, MeanAndSd, UntrainedFigures, plain_json
from patch_aligned.analysis.token_map_page import (
    distinct_pictures,
    picture_svg,
    save_token_map_figures,
    token_map_svg,
    write_token_map_page,
)
from patch_aligned.analysis.words import MappedImage, TokenMaps, colours_of_words, map_caption
from patch_aligned.files import checkpoint_hash, written_whole
from patch_aligned.html_page import static_page
from patch_aligned.models.base import VisionLanguageModel

if TYPE_CHECKING:
    from matplotlib.lines import Line2D


# The tables of a report, as rows of cells; `as_markdown` and `as_html` write them.

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

MOST_LABELS = 20
"""Labels that a report shows, the most frequent ones; the JSON has all."""

_IN_BREAKDOWNS = ("align_px", "cosine")


class Cell(NamedTuple):
    """What a cell says, and in smaller type an interval or an explanation."""

    text: str
    aside: str = ""


@dataclass(frozen=True)
class ReportTable:
    """A table: its columns, then rows whose first cell names them."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]


def headline_table(analysis: Analysis) -> ReportTable:
    """The columns of the paper's Table 3, and the cosine with wrong labels as a control."""
    rows = []
    for name, model in analysis.models.items():
        entropies = (model.entropy_before.entropy_nats, model.entropy_after.entropy_nats, model.entropy_drop_nats)
        rows.append(
            (
                Cell(name),
                *(Cell(number(value)) for value in entropies),
                _figure(model.figures["align_px"]),
                _figure(model.figures["cosine"], 2),
                _figure(model.figures["shuffled_cosine"], 2),
            )
        )
    for name, before, untrained in _untrained(analysis):
        rows.append(
            (
                *_entropies_of_untrained(name, before, untrained),
                _spread(untrained.figures["align_px"]),
                _spread(untrained.figures["cosine"], 2),
                _spread(untrained.figures["shuffled_cosine"], 2),
            )
        )
    columns = ("Projector", "H before", "H after", "ΔH", "Align(V, W)", "cosine", "cosine, shuffled labels")
    return ReportTable(columns, rows)


def paper_table() -> ReportTable:
    """The paper's Table 3 in the columns of `headline_table`."""
    rows = [
        (
            Cell(name),
            Cell(number(PAPER_ENTROPY_BEFORE_NATS)),
            Cell(number(PAPER_ENTROPY_BEFORE_NATS - row["entropy_drop_nats"])),
            Cell(number(row["entropy_drop_nats"])),
            Cell(number(row["align_px"])),
            Cell(number(row["cosine"], 2)),
        )
        for name, row in PAPER_TABLE_3.items()
    ]
    return ReportTable(("Projector", "H before", "H after", "ΔH", "Align(V, W)", "cosine"), rows)


def entropy_table(analysis: Analysis) -> ReportTable:
    """Entropies and effective ranks, before and after (the paper's Table 1)."""
    rows: list[tuple[Cell, ...]] = []
    for name, model in analysis.models.items():
        before, after = model.entropy_before, model.entropy_after
        rows.append(
            (
                Cell(name),
                Cell(number(before.entropy_nats), f"of at most {number(math.log(before.width), 2)}"),
                Cell(number(after.entropy_nats), f"of at most {number(math.log(after.width), 2)}"),
                Cell(number(model.entropy_drop_nats)),
                Cell(number(before.effective_rank, 1), f"of {before.width}"),
                Cell(number(after.effective_rank, 1), f"of {after.width}"),
                Cell(f"{after.tokens:,}"),
            )
        )
    for name, before_nats, untrained in _untrained(analysis):
        rows.append(
            (
                *_entropies_of_untrained(name, before_nats, untrained),
                Cell(number(math.exp(before_nats), 1)),
                _spread(untrained.effective_rank_after, 1),
                Cell(""),
            )
        )
    ranks = ("effective rank before", "effective rank after")
    return ReportTable(("Projector", "H before", "H after", "ΔH", *ranks, "visual tokens"), rows)


def figures_table(analysis: Analysis) -> ReportTable:
    """Every figure with its rule, a row each, and the projectors side by side."""
    untrained = _untrained(analysis)
    rows = [
        (
            Cell(name, analysis.rules[name]),
            *(_figure(model.figures[name]) for model in analysis.models.values()),
            *(_spread(found.figures[name]) for _, _, found in untrained),
        )
        for name in FIGURES
        if name.removeprefix("align_px_") not in THRESHOLD_RULES  # they have a table of their own
    ]
    return ReportTable(("Figure", *analysis.models, *(name for name, _, _ in untrained)), rows)


def thresholds_table(analysis: Analysis) -> ReportTable:
    """Align(V, W) under each threshold rule."""
    rows = [
        (Cell(name), *(_figure(model.figures[f"align_px_{rule}"]) for rule in THRESHOLD_RULES))
        for name, model in analysis.models.items()
    ]
    return ReportTable(("Projector", *THRESHOLD_RULES), rows)


def differences_table(analysis: Analysis) -> ReportTable:
    """The headline figures of each pair of projectors, the later less the earlier."""
    rows = [
        (Cell(f"{pair.first} − {pair.second}"), *(_figure(pair.figures[name]) for name in HEADLINES))
        for pair in analysis.comparisons
    ]
    return ReportTable(("Difference", *HEADLINES), rows)


def sizes_table(analysis: Analysis) -> ReportTable:
    """Align and cosine of small, medium and large regions."""
    return _breakdown(analysis, "Size", {name: model.by_size for name, model in analysis.models.items()})


def labels_table(analysis: Analysis) -> ReportTable:
    """Align and cosine of the most frequent labels' regions."""
    return _breakdown(analysis, "Label", {name: model.by_label for name, model in analysis.models.items()})


def counts_table(analysis: Analysis) -> ReportTable:
    """What each projector's figures count, and what they leave out."""
    images = ("images with regions", "of them without covered token")
    regions = ("regions", "outside the model's image", "inside, but without covered token")
    rows = []
    for name, model in analysis.models.items():
        counts = model.counts
        shown = (
            counts.images_with_regions, counts.images_without_token, counts.regions, counts.regions_outside,
            counts.regions_without_token,
        )  # fmt: skip
        rows.append((Cell(name), *(Cell(f"{count:,}") for count in shown)))
    return ReportTable(("Projector", *images, *regions), rows)


def as_markdown(table: ReportTable) -> list[str]:
    """Lines of a Markdown table; asides stand in brackets."""
    head = ["| " + " | ".join(table.columns) + " |", "|---|" + "--:|" * (len(table.columns) - 1)]
    lines = [[f"{text} ({aside})" if aside else text for text, aside in row] for row in table.rows]
    return [*head, *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)]


def as_html(table: ReportTable, title: str) -> str:
    """A table in a box that scrolls where the page is narrow; `title` names it for screen readers."""
    head = "".join(f'<th scope="col">{breakable(column)}</th>' for column in table.columns)
    body = []
    for first, *others in table.rows:
        cells = "".join(f"<td>{_html(cell)}</td>" for cell in others)
        body.append(f'<tr><th scope="row">{_html(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(title)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def breakable(text: str) -> str:
    """Text for HTML in which long names and paths may go on in the next line."""
    return html.escape(text).replace("_", "_<wbr>").replace("/", "/<wbr>")


def number(value: float, digits: int = 3) -> str:
    """A number as tables show it; a dash for NaN."""
    if math.isnan(value):
        return "–"
    shown = f"{value:.{digits}f}"
    return f"{0:.{digits}f}" if float(shown) == 0 else shown.replace("-", "−")


def _html(cell: Cell) -> str:
    aside = f"<small>{html.escape(cell.aside)}</small>" if cell.aside else ""
    return f"{breakable(cell.text)}{aside}"


def _figure(figure: Figure | Difference, digits: int = 3) -> Cell:
    interval = "" if math.isnan(figure.low) else f"{number(figure.low, digits)} … {number(figure.high, digits)}"
    return Cell(number(figure.value, digits), interval)


def _spread(spread: MeanAndSd, digits: int = 3) -> Cell:
    return Cell(number(spread.mean, digits), "" if math.isnan(spread.sd) else f"± {number(spread.sd, digits)}")


def _entropies_of_untrained(name: str, before_nats: float, untrained: UntrainedFigures) -> tuple[Cell, ...]:
    """What a row of untrained projectors begins with: name, entropies before and after, and their difference."""
    seeds = f"± sd, {len(untrained.seeds)} seeds" if len(untrained.seeds) > 1 else "1 seed"
    after = (_spread(untrained.entropy_after_nats), _spread(untrained.entropy_drop_nats))
    return Cell(name, seeds), Cell(number(before_nats)), *after


def _untrained(analysis: Analysis) -> list[tuple[str, float, UntrainedFigures]]:
    """Name, entropy before and figures of the untrained projectors; models of one shape share theirs."""
    of_shape: dict[int, tuple[str, float, UntrainedFigures]] = {}
    for name, model in analysis.models.items():
        if model.untrained is not None and id(model.untrained) not in of_shape:
            of_shape[id(model.untrained)] = (name, model.entropy_before.entropy_nats, model.untrained)
    if len(of_shape) == 1:
        return [("untrained", before, figures) for _, before, figures in of_shape.values()]
    return [(f"untrained, as {name}", before, figures) for name, before, figures in of_shape.values()]


def _breakdown(analysis: Analysis, what: str, parts: dict[str, dict[str, dict[str, Figure]]]) -> ReportTable:
    """Rows are the parts, in the order of the first model; `parts` holds model -> part -> figure's name -> figure."""
    first = next(iter(parts.values()))
    columns = [f"{figure}, {name}" for figure in _IN_BREAKDOWNS for name in analysis.models]
    rows = [
        (
            Cell(part),
            Cell(f"{figures['align_px'].regions:,}"),
            *(_figure(parts[name][part][figure], 2) for figure in _IN_BREAKDOWNS for name in analysis.models),
        )
        for part, figures in list(first.items())[:MOST_LABELS]
    ]
    return ReportTable((what, "regions", *columns), rows)


def as_text(cells: Sequence[Cell]) -> list[str]:
    """Cells for a terminal: the aside on a line of its own, as narrow as it goes."""
    return [f"{text}\n{aside.replace(' … ', '…')}" if aside else text for text, aside in cells]


MOST_BROKEN_IMAGES = 20
"""Images left out that a report names; the JSON has all."""


def report_page(analysis: Analysis, provenance: Mapping[str, Any], spectra_svg: str, maps: TokenMaps | None) -> str:
    """The whole page.

    Args:
        analysis: the numbers and the localisation maps.
        provenance: see `report.write_report`.
        spectra_svg: the drawing of the spectra.
        maps: token maps; None leaves their section out.
    """
    sections = {
        "Three measures": _measures(analysis),
        "Entropy": _entropy(analysis, spectra_svg),
        "Every figure": _figures(analysis),
        "Differences": _differences(analysis) if analysis.comparisons else "",
        "Sizes and labels": _breakdowns(analysis),
        "Where labels are found": _localisation(analysis) if analysis.picture else "",
        "Words on the patches": _token_maps(maps) if maps else "",
        "What was left out": _left_out(analysis),
        "Where the numbers come from": _provenance(analysis, provenance),
    }
    shown = {title: content for title, content in sections.items() if content}
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in shown)
    body = "".join(
        f'<section id="{_anchor(title)}"><h2>{title}</h2>{content}</section>' for title, content in shown.items()
    )
    names = ", ".join(analysis.models)
    title = f"Analysis: {names}"
    regions = max(model.counts.regions for model in analysis.models.values())
    broken = f" ({len(analysis.broken_images):,} more were left out)" if analysis.broken_images else ""
    subtitle = (
        f"{analysis.images:,} images{broken}, {regions:,} regions, {analysis.labels:,} labels of "
        f"<code>{html.escape(str(analysis.settings.measure.data))}</code>; threshold rule "
        f"<code>{analysis.settings.measure.threshold_rule}</code>."
    )
    header = f"<header><h1>{breakable(title)}</h1><p>{subtitle}</p><nav>{links}</nav></header>"
    return static_page(__package__, "report", title, f"{header}<main>{body}</main>")


def _measures(analysis: Analysis) -> str:
    rules = analysis.rules
    confidence = analysis.settings.resampling.confidence
    return (
        _table("Three measures", headline_table(analysis))
        + _note(
            "H: Von Neumann entropy of the tokens in nats, before and after the projector; ΔH is what the projector "
            f"compresses. Align(V, W): {rules['align_px']}. Cosine: {rules['cosine']}. Shuffled labels: "
            f"{rules['shuffled_cosine']}. Below each figure its {confidence:.0%} interval, by the bootstrap over "
            "images; of untrained projectors mean and standard deviation over seeds."
        )
        + "<h3>The paper's Table 3, at 7B scale</h3>"
        + _table("The paper's Table 3", paper_table())
        + _note(
            f"{PAPER_CONDITIONS} Other models and other images: what compares is the order of the rows, not the "
            "numbers."
        )
    )


def _entropy(analysis: Analysis, spectra_svg: str) -> str:
    drawing = spectra_svg[spectra_svg.index("<svg") :]
    alt = "Shares of the directions, the largest first, before and after each projector, both axes logarithmic"
    return (
        _table("Entropy", entropy_table(analysis))
        + _note(
            "The paper's Table 1. The second moment of all tokens, not centred, divided by its trace; H is the entropy "
            "of its eigenvalues, the effective rank exp(H) the number of evenly used directions with the same entropy."
        )
        + f'<div class="chart" role="img" aria-label="{alt}">{drawing}</div>'
    )


def _figures(analysis: Analysis) -> str:
    return (
        _table("Every figure", figures_table(analysis), "rules")
        + "<h3>Align(V, W) under each threshold rule</h3>"
        + _table("Threshold rules", thresholds_table(analysis))
        + _note(
            "mid_range: halfway between the map's lowest and highest cosine. otsu: the cut into two classes with the "
            "largest variance between them. mean_std: mean plus one standard deviation. top_area: as many tokens as "
            "the region has cells, so it is told the size. Compare projectors within a column, not the columns."
        )
    )


def _differences(analysis: Analysis) -> str:
    differing = (
        " Here the models count different regions (see what was left out), so a difference is also one of regions."
        if analysis.counts_differ
        else ""
    )
    return _table("Differences", differences_table(analysis)) + _note(
        "The later projector less the earlier, with a paired interval: both over the same draws of images. An interval "
        f"without 0 is a difference that these images tell from chance.{differing}"
    )


def _breakdowns(analysis: Analysis) -> str:
    labels = (
        f"The {MOST_LABELS} most frequent of {analysis.labels:,} labels" if analysis.labels > MOST_LABELS else "Labels"
    )
    rules = (
        f"align_px: {analysis.rules['align_px']}. cosine: {analysis.rules['cosine']}. Sizes by COCO's bounds: small "
        "below 32², large from 96² pixels of the original image on."
    )
    return (
        _table("Sizes", sizes_table(analysis))
        + _note(rules)
        + f"<h3>{labels}</h3>"
        + _table("Labels", labels_table(analysis))
        + _note(
            "Intervals over a handful of images are too narrow: they draw again from what these few show, and nothing "
            "else. Read them as the spread among these images."
        )
    )


def _localisation(analysis: Analysis) -> str:
    parts = [
        _note(
            "Images spread evenly over the set, each with its largest region; no score decides what is shown. Cosine "
            "maps are coloured from their own lowest to their own highest value, which stand below, with the region's "
            "outline. Beside each the prediction: tokens above the threshold "
            f"({analysis.settings.measure.threshold_rule}) keep their colours, all others are paled."
        )
    ]
    for row in analysis.picture:
        jpegs = panel_jpegs(row)
        label = html.escape(row.label)
        panels = [
            f"<figure><div>{_image(jpegs['truth'], f'{row.label} in {row.image_id}, with its outline')}</div>"
            "<figcaption><b>ground truth</b></figcaption></figure>"
        ]
        for name, cell in row.cells.items():
            cosines = f"{number(float(cell.cosine.min()), 2)} … {number(float(cell.cosine.max()), 2)}"
            heat = _image(jpegs[name, "cosine"], f"Cosine of each token with {row.label}, {name}: {cosines}")
            mask = _image(jpegs[name, "prediction"], f"Tokens predicted for {row.label}, {name}")
            caption = f"<b>{breakable(name)}</b>cosine {cosines} · IoU {number(cell.iou_px, 2)}"
            panels.append(f'<figure class="pair"><div>{heat}{mask}</div><figcaption>{caption}</figcaption></figure>')
        heading = f"<h3>{label} <small>{html.escape(row.image_id)}</small></h3>"
        parts.append(f'<div class="place">{heading}<div class="panels">{"".join(panels)}</div></div>')
    return "".join(parts)


def _token_maps(maps: TokenMaps) -> str:
    colours = (
        "English words have colours, a word the same in all maps"
        if maps.word_list
        else "no list of English words is installed, so none is coloured"
    )
    algorithm = " (the paper's Algorithm 1)" if maps.settings.as_in_the_paper else ""
    parts = [
        _note(
            f"Which words each visual token is made of: {maps.settings.described()}{algorithm}. The "
            f"larger a word, the larger its cosine with what is left of the token; {colours}. token_map.html, beside "
            "this page, shows every word with its numbers."
        )
    ]
    for place, image in enumerate(maps.images):
        parts.append(f"<h3>{html.escape(image.image_id)}</h3>{_maps_of_image(image, f'picture-{place}')}")
    return "".join(parts)


def _maps_of_image(image: MappedImage, picture: str) -> str:
    colours = colours_of_words(image)
    pictures, picture_of = distinct_pictures(image)
    parts = [picture_svg(f"{picture}-{index}", address) for index, address in enumerate(pictures)]
    for name, token_map in image.maps.items():
        columns = token_map.grid[1]
        figures = []
        for turn in range(token_map.pursuit.ids.shape[1]):
            drawing = token_map_svg(token_map, turn, f"{picture}-{picture_of[name]}", colours, image.top_cosine, name)
            caption = f"<b>{breakable(name)}</b>{html.escape(map_caption(token_map, turn))}"
            figures.append(f'<figure><div class="scroll">{drawing}</div><figcaption>{caption}</figcaption></figure>')
        style = f"--map-width:{22 * columns}px;--print-columns:{3 if columns <= 12 else 2}"
        parts.append(f'<div class="maps" style="{style}">{"".join(figures)}</div>')
    return "".join(parts)


def _left_out(analysis: Analysis) -> str:
    skipped = {reason: f"{count:,}" for reason, count in analysis.skipped.items()}
    of_file = (
        f"<h3>Annotations of the whole file that are no regions</h3>{_definitions(skipped)}"
        if skipped
        else _note("All annotations of the file are regions.")
    )
    broken = analysis.broken_images
    if broken:
        shown = dict(list(broken.items())[:MOST_BROKEN_IMAGES])
        more = _note(f"The first {MOST_BROKEN_IMAGES}; analysis.json has all.") if len(broken) > len(shown) else ""
        of_file += f"<h3>{len(broken):,} images that cannot be measured</h3>{_definitions(shown)}{more}"
    return (
        _table("Regions", counts_table(analysis))
        + _note(
            "A region outside the model's image, cut away by the crop, counts nowhere. One that covers no token from "
            f"{analysis.settings.measure.min_coverage} of its cell on counts in the figures by area only."
        )
        + of_file
    )


def _provenance(analysis: Analysis, provenance: Mapping[str, Any]) -> str:
    hashes = provenance.get("sha256", {})

    def place(path: str) -> str:
        sha256 = hashes.get(path)
        digest = f"<small>SHA-256 {sha256[:16]}</small>" if sha256 else ""
        return f"{breakable(path)}{digest}"

    rows = "".join(
        f'<tr><th scope="row">{breakable(name)}</th><td>{place(model.source)}</td><td>{place(model.tower)}</td>'
        f"<td>{place(model.words)}</td><td>{model.grid[0]} × {model.grid[1]}</td></tr>"
        for name, model in analysis.models.items()
    )
    columns = "".join(
        f'<th scope="col">{name}</th>' for name in ("Projector", "weights", "vision tower", "word embeddings", "grid")
    )
    measure, resampling = analysis.settings.measure, analysis.settings.resampling
    subset = "all" if measure.limit is None else f"{measure.subset}, {measure.limit:,}"
    settings = {
        "data": f"{measure.data}, format {analysis.data_format}",
        "images": f"{measure.image_folder}, {subset}",
        "regions": measure.region_kind or "all",
        "threshold rule": measure.threshold_rule,
        "a token is covered from": f"{measure.min_coverage} of its cell",
        "seed": f"{measure.seed}: shuffled labels, random subset, bootstrap",
        "intervals": f"{resampling.confidence:.0%}, {resampling.resamples:,} resamples of images",
        "untrained projectors": f"seeds {', '.join(map(str, analysis.settings.untrained_seeds)) or 'none'}",
        **{key: str(value) for key, value in provenance.items() if key not in ("sha256", "versions")},
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items()),
        "speed": f"{analysis.images_per_second:.1f} images a second, all projectors together",
    }
    return (
        '<div class="scroll text" role="region" tabindex="0" aria-label="Models"><table>'
        f"<thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
        + _note(
            "SHA-256 of weight files and configs together, here its first 16 digits; analysis.json has it whole, and "
            "patch_aligned.files says how it is taken."
        )
        + _definitions({key: value for key, value in settings.items() if value})
    )


def _table(title: str, table: ReportTable, kind: str = "") -> str:
    box = as_html(table, title)
    return box.replace('class="scroll"', f'class="scroll {kind}"', 1) if kind else box


def _definitions(entries: Mapping[str, str]) -> str:
    return (
        f"<dl>{''.join(f'<dt>{breakable(key)}</dt><dd>{breakable(value)}</dd>' for key, value in entries.items())}</dl>"
    )


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text, quote=False)}</p>'


def _image(jpeg: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


# Spectra before and after projectors in one picture: how fast the shares of the directions fall.

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


# An analysis as files: the page, the headline as Markdown, every number as JSON, and the pictures.

_PICTURES = ("localisation.png", "token_map.html", "token_map.json", "token_map_[0-9][0-9][0-9]_*.png")


def write_report(
    analysis: Analysis, folder: Path, maps: TokenMaps | None = None, provenance: Mapping[str, Any] | None = None
) -> list[Path]:
    """Writes `report.html`, `report.md`, `analysis.json` and the pictures into a folder, made where it is missing.

    Those of an earlier report there are replaced, and its other pictures removed.

    Args:
        analysis: what was found.
        folder: where everything goes.
        maps: token maps of some images, for the page and for `token_map.html`.
        provenance: what else the numbers hang on, such as `provenance_of` gives.

    Returns:
        The paths written, the page first.

    Raises:
        ImportError: matplotlib is not installed.
    """
    provenance = provenance or {}
    folder.mkdir(parents=True, exist_ok=True)
    spectra = folder / "spectra.svg"
    save_spectra_figure(analysis, spectra)
    pictures = [spectra]
    if analysis.picture:
        pictures.append(folder / "localisation.png")
        save_localisation_figure(analysis.picture, pictures[-1], analysis.settings.measure.threshold_rule)
    if maps:
        pictures += [*write_token_map_page(maps, folder), *save_token_map_figures(maps, folder, prefix="token_map_")]
    for earlier in {path for pattern in _PICTURES for path in folder.glob(pattern)} - set(pictures):
        earlier.unlink()  # or it would pass for this analysis's
    texts = {
        "report.html": report_page(analysis, provenance, spectra.read_text(encoding="utf-8"), maps),
        "report.md": report_markdown(analysis),
        "analysis.json": json.dumps(report_json(analysis, provenance), indent=1, ensure_ascii=False, allow_nan=False),
    }
    for name, text in texts.items():
        with written_whole(folder / name) as file:
            file.write_text(text.rstrip() + "\n", encoding="utf-8")
    return [*(folder / name for name in texts), *pictures]


def report_json(analysis: Analysis, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Every number with its rule, the settings and the provenance; NaN becomes null."""
    extra = plain_json({"provenance": provenance, "paper_table_3_at_7b_scale": PAPER_TABLE_3})
    return {**analysis.to_json(), **extra}


def report_markdown(analysis: Analysis) -> str:
    """The headline table, what it was taken on, and the paper's Table 3."""
    measure = analysis.settings.measure
    first, model = next(iter(analysis.models.items()))
    counts = model.counts
    kind = f" of kind `{measure.region_kind}`" if measure.region_kind else ""
    outside = f"{counts.regions_outside} outside the model's image and left out, " if counts.regions_outside else ""
    broken = (
        f" {len(analysis.broken_images):,} more images were left out: they could not be measured."
        if analysis.broken_images
        else ""
    )
    differing = f" (of {first}; the page has the counts of all)" if analysis.counts_differ else ""
    lines = [
        "# Analysis of projectors",
        "",
        *as_markdown(headline_table(analysis)),
        "",
        f"{analysis.images} images, {counts.regions} regions{kind}: {outside}{counts.regions_without_token} cover no "
        f"token and count in Align alone{differing}.{broken}",
        "Entropies H in nats; ΔH is before minus after. Align is the mean over regions of the IoU by area, with the "
        f"threshold rule `{measure.threshold_rule}`. The last column is a control: the same cosine with another "
        f"region's label (seed {measure.seed}). In brackets {analysis.settings.resampling.confidence:.0%} intervals, "
        "by the bootstrap over images.",
        "",
        "## The paper's Table 3, at 7B scale",
        "",
        "Other models, other images: what can be compared is the order of the rows, not the numbers.",
        "",
        *as_markdown(paper_table()),
        "",
        PAPER_CONDITIONS,
    ]
    return "\n".join(lines)


def provenance_of(models: Sequence[VisionLanguageModel]) -> dict[str, Any]:
    """Device, versions, and the SHA-256 of all weights that lie in local files, by their path."""
    places = {
        place
        for model in models
        for place in (model.source, model.encoder.name, model.words.source)
        if Path(place).exists()
    }
    return {
        "device": models[0].encoder.device,
        "dtype": "float32",
        "image_aspect_ratio": ", ".join(sorted({model.encoder.image_aspect_ratio for model in models})),
        "versions": {name: version(name) for name in ("patch-aligned-llava", "torch", "transformers")},
        "sha256": {place: checkpoint_hash(place).sha256 for place in sorted(places)},
    }
