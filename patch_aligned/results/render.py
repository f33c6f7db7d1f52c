"""A printed table as data, and as Markdown, LaTeX and HTML."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from patch_aligned.results.paper import DASH
from patch_aligned.web import render


@dataclass(frozen=True)
class Cell:
    """A number as text, its standard error, and a mark that a note explains."""

    text: str = DASH
    stderr: str = ""
    mark: str = ""

    def __str__(self) -> str:
        return self.text + (f" ±{self.stderr}" if self.stderr else "") + (f" {self.mark}" if self.mark else "")


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    label: str
    cells: tuple[Cell, ...]
    section: str = ""  # heading above the first of several rows


@dataclass(frozen=True)
class Block:
    """A table with its notes."""

    title: str
    corner: str  # heading of the rows' labels
    columns: tuple[tuple[str, str], ...]  # of each the heading over several columns (or ""), and its own
    rows: tuple[Row, ...]  # with one cell per column
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"row {row.label!r}: {len(row.cells)} cells, expected {len(self.columns)}")

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings over neighbouring columns, with their number of columns; empty if there are none."""
        if not any(group for group, _ in self.columns):
            return []
        neighbours = itertools.groupby(group for group, _ in self.columns)
        return [(group, len(list(members))) for group, members in neighbours]

    @property
    def sections(self) -> list[tuple[str, list[Row]]]:
        """The rows under each heading, in order."""
        return [(name, list(rows)) for name, rows in itertools.groupby(self.rows, key=lambda row: row.section)]


def as_markdown(blocks: Sequence[Block]) -> str:
    """Blocks as Markdown, aligned so that they read well as plain text too."""
    return "\n".join(_markdown_of(block) for block in blocks)


def _markdown_of(block: Block) -> str:
    heading = [block.corner, *(f"{group} {name}".strip() for group, name in block.columns)]
    lines = [heading]
    for section, rows in block.sections:
        if section:
            lines.append([f"*{section}*", *("" for _ in block.columns)])
        lines += [[row.label, *map(str, row.cells)] for row in rows]
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
        *_latex_groups(block),
        _latex_line([latex_text(block.corner), *(latex_text(name) for _, name in block.columns)]),
        r"\midrule",
    ]
    for section, rows in block.sections:
        if section:
            rule = [] if lines[-1] == r"\midrule" else [r"\midrule"]
            lines += [*rule, rf"\multicolumn{{{width}}}{{l}}{{\textit{{{latex_text(section)}}}}} \\"]
        lines += [_latex_line([latex_text(row.label), *map(_latex_cell, row.cells)]) for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    if block.notes:
        lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize"]
        lines += [rf"{latex_text(note)}\par" for note in block.notes]
        lines += [r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}", ""])


def _latex_groups(block: Block) -> list[str]:
    if not block.groups:
        return []
    heads, rules, first = [""], [], 2
    for group, count in block.groups:
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


def as_html(blocks: Sequence[Block]) -> str:
    """Blocks as one page that loads nothing. Wide tables scroll sideways, and print in full."""
    return render(__package__, "tables.html.j2", title=blocks[0].title, blocks=blocks)
