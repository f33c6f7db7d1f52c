"""A printed table as data, and as Markdown and LaTeX."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from patch_aligned.results.paper import DASH
from patch_aligned.web import render


@dataclass(frozen=True)
class Cell:
    """What a cell shows: a number as text, its standard error, and a mark that a note explains."""

    text: str = DASH
    stderr: str = ""
    mark: str = ""

    def __str__(self) -> str:
        return self.text + (f" ±{self.stderr}" if self.stderr else "") + (f" {self.mark}" if self.mark else "")


@dataclass(frozen=True)
class Row:
    """A line; `section` is the heading that stands above the first of several."""

    label: str
    cells: tuple[Cell, ...]
    section: str = ""


@dataclass(frozen=True)
class Block:
    """A table with its notes.

    Attributes:
        title: plain text.
        corner: heading of the rows' labels.
        columns: heading over several columns (or nothing) and heading, of each.
        rows: lines, with as many cells as columns.
        notes: sentences below.
    """

    title: str
    corner: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"row {row.label!r}: {len(row.cells)} cells, expected {len(self.columns)}")


def as_markdown(blocks: Sequence[Block]) -> str:
    """Blocks as Markdown, padded so that they read well as plain text too."""
    return "\n".join(_markdown_of(block) for block in blocks)


def _markdown_of(block: Block) -> str:
    heading = [block.corner, *(f"{group} {name}".strip() for group, name in block.columns)]
    lines: list[list[str] | str] = [heading]
    section = ""
    for row in block.rows:
        if row.section != section:
            section = row.section
            lines.append([f"*{section}*" if section else "", *("" for _ in block.columns)])
        lines.append([row.label, *map(str, row.cells)])
    cells = [[_markdown_text(cell) for cell in line] for line in lines]
    widths = [max(3, *(len(line[index]) for line in cells)) for index in range(len(heading))]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in (cells[0], rule, *cells[1:])
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in padded)
    notes = "\n".join(f"- {_markdown_text(note)}" for note in block.notes)
    return f"## {_markdown_text(block.title)}\n\n{table}\n" + (f"\n{notes}\n" if notes else "")


def _markdown_text(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


_WORD_JOINER = "\u2060"
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''",
    "–": "--", "−": "$-$", "±": r"$\pm$", "→": r"$\to$", "†": r"$\dagger$", "…": r"\ldots{}",
    "“": "``", "”": "''",
    "[": "{[}", "*": "{*}",  # a row that begins with one is else taken for an option of the row before
    _WORD_JOINER: "{}",
}  # fmt: skip


def latex_text(text: str) -> str:
    """Plain text for LaTeX; characters beyond Latin script appear by their number, since fonts may lack them."""
    text = re.sub("-(?=-)", f"-{_WORD_JOINER}", " ".join(text.split()))  # two hyphens, as of --limit, would be a dash
    text = re.sub(r"(?<!\S)-(?=\d)", "−", text)
    return "".join(
        _LATEX.get(letter, letter if letter.isprintable() and ord(letter) < 0x180 else f"{{[}}U+{ord(letter):04X}]")
        for letter in text
    )


def as_latex(blocks: Sequence[Block]) -> str:
    """Blocks as LaTeX tables, for a document that uses the package booktabs."""
    return "% \\usepackage{booktabs}\n" + "\n".join(_latex_of(block) for block in blocks)


def _latex_of(block: Block) -> str:
    width = len(block.columns) + 1
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{latex_text(block.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(block.columns)}}}",
        r"\toprule",
        *_latex_groups(block.columns),
        _latex_line([latex_text(block.corner), *(latex_text(name) for _, name in block.columns)]),
        r"\midrule",
    ]
    section = ""
    for row in block.rows:
        if row.section != section:
            section = row.section
            lines += [
                *([r"\midrule"] if lines[-1] != r"\midrule" else []),
                rf"\multicolumn{{{width}}}{{l}}{{\textit{{{latex_text(section)}}}}} \\",
            ]
        lines.append(_latex_line([latex_text(row.label), *map(_latex_cell, row.cells)]))
    lines += [r"\bottomrule", r"\end{tabular}"]
    if block.notes:
        lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize"]
        lines += [rf"{latex_text(note)}\par" for note in block.notes]
        lines += [r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}", ""])


def _latex_groups(columns: Sequence[tuple[str, str]]) -> list[str]:
    if not any(group for group, _ in columns):
        return []
    heads, rules, first = [""], [], 2
    for group, members in itertools.groupby(columns, key=lambda column: column[0]):
        count = len(list(members))
        heads.append(rf"\multicolumn{{{count}}}{{c}}{{{latex_text(group)}}}")
        if group:
            rules.append(rf"\cmidrule(lr){{{first}-{first + count - 1}}}")
        first += count
    return [_latex_line(heads), "".join(rules)]


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(cell: Cell) -> str:
    stderr = rf" {{\scriptsize$\pm${latex_text(cell.stderr)}}}" if cell.stderr else ""
    return latex_text(cell.text) + stderr + (f" {latex_text(cell.mark)}" if cell.mark else "")


# Tables as one HTML page that loads nothing.


def as_html(blocks: Sequence[Block]) -> str:
    """Blocks as a page: read on a phone, sideways where a table is wide, or printed."""
    return render(__package__, "tables.html.j2", title=blocks[0].title, data=[asdict(block) for block in blocks])
