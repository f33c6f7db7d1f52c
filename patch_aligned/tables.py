"""One table as Markdown, HTML and text for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from markupsafe import Markup, escape

from patch_aligned.web import breakable

if TYPE_CHECKING:
    from rich.table import Table as RichTable


class Cell(NamedTuple):
    """The text of a cell, and in smaller type an interval or an explanation."""

    text: str
    aside: str = ""


@dataclass(frozen=True)
class Table:
    """Columns, and rows whose first cell is a heading. A row may be shorter than the columns."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1  # the first columns, aligned to the left; numbers follow, aligned to the right

    def markdown(self) -> str:
        """Render as Markdown. Asides are in brackets, the title is left out."""
        rule = "|" + "---|" * self.text_columns + "--:|" * (len(self.columns) - self.text_columns)
        head = ["| " + " | ".join(self.columns) + " |", rule]
        lines = [[f"{text} ({aside})" if aside else text for text, aside in row] for row in self.rows]
        return "\n".join(
            [*head, *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)]
        )

    def html(self, kind: str = "") -> Markup:
        """Render as a box that scrolls where the page is narrow. The title names it for screen readers."""
        head = Markup("").join(Markup('<th scope="col">{}</th>').format(breakable(name)) for name in self.columns)
        body = Markup("").join(
            Markup('<tr><th scope="row">{}</th>{}</tr>').format(
                _html(first), Markup("").join(Markup("<td>{}</td>").format(_html(cell)) for cell in others)
            )
            for first, *others in self.rows
        )
        return Markup(
            '<div class="{}" role="region" tabindex="0" aria-label="{}"><table>'
            "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
        ).format(f"scroll {kind}".strip(), self.title, head, body)

    def text(self) -> RichTable:
        """Render for the terminal. Where it is narrow, headings and long names are folded and numbers stay whole."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title, box=None, padding=(0, 1, 0, 0), pad_edge=False)
        rows = [[f"{text}\n{aside.replace(' … ', '…')}" if aside else text for text, aside in row] for row in self.rows]
        for index, column in enumerate(self.columns):
            widest = max((len(line) for row in rows for line in row[index].splitlines()), default=0)
            is_number = index >= self.text_columns
            justify: Literal["left", "right"] = "right" if is_number else "left"
            width = widest if is_number else min(widest, 13)
            table.add_column(column, justify=justify, overflow="fold", min_width=width)
        for row in rows:
            table.add_row(*map(Text, row))  # brackets in data are no markup
        return table


def number(value: float, digits: int = 3) -> str:
    """Format a number for a table; a dash for NaN."""
    if math.isnan(value):
        return "–"
    shown = f"{value:.{digits}f}"
    return f"{0:.{digits}f}" if float(shown) == 0 else shown.replace("-", "−")


def _html(cell: Cell) -> Markup:
    aside = Markup("<small>{}</small>").format(cell.aside) if cell.aside else escape("")
    return breakable(cell.text) + aside
