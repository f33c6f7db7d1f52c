"""The tables of a report, as rows of cells; `as_markdown` and `as_html` write them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from patch_aligned.analysis.alignment import THRESHOLD_RULES
from patch_aligned.analysis.analysis_results import Analysis, MeanAndSd, UntrainedFigures
from patch_aligned.analysis.figures import FIGURES, HEADLINES, Difference, Figure

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
