"""Puts the first table of a report between the README's quickstart markers: `show_in_readme.py README REPORT`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

START, END = "<!-- quickstart", "<!-- quickstart end -->"


def first_table(report: str) -> list[str]:
    """Lines of the first Markdown table.

    Raises:
        ValueError: if there is none.
    """
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), report.splitlines())
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    if not table:
        raise ValueError("the report holds no Markdown table")
    return table


def with_table(readme: str, table: list[str]) -> str:
    """The README with `table` in the place of what stands between its markers.

    Raises:
        ValueError: if a marker is missing.
    """
    lines = readme.splitlines()
    starts = [row for row, line in enumerate(lines) if line.startswith(START) and not line.startswith(END)]
    ends = [row for row, line in enumerate(lines) if line.startswith(END)]
    if len(starts) != 1 or len(ends) != 1:
        raise ValueError(f"the README holds no pair of markers {START!r} and {END!r}")
    return "\n".join([*lines[: starts[0] + 1], *table, *lines[ends[0] :]]) + "\n"


if __name__ == "__main__":
    readme_path, report_path = map(Path, sys.argv[1:])
    table_lines = first_table(report_path.read_text(encoding="utf-8"))
    readme_path.write_text(with_table(readme_path.read_text(encoding="utf-8"), table_lines), encoding="utf-8")
