"""A report's page: one HTML file that holds its tables and pictures, runs no script and loads nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from typing import Any

from patch_aligned.analysis.analysis_results import Analysis
from patch_aligned.analysis.localisation_figure import panel_jpegs
from patch_aligned.analysis.report_tables import (
    MOST_LABELS,
    PAPER_CONDITIONS,
    ReportTable,
    as_html,
    breakable,
    counts_table,
    differences_table,
    entropy_table,
    figures_table,
    headline_table,
    labels_table,
    number,
    paper_table,
    sizes_table,
    thresholds_table,
)
from patch_aligned.analysis.token_map import MappedImage, TokenMaps, colours_of_words, map_caption
from patch_aligned.analysis.token_map_page import distinct_pictures
from patch_aligned.analysis.token_map_svg import picture_svg, token_map_svg
from patch_aligned.html_page import static_page

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
            "patch_aligned.checkpoint_hash says how it is taken."
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
