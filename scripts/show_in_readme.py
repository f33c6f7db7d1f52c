"""Puts the quickstart's figures between the README's markers: `show_in_readme.py README ANALYSIS_JSON`.

Figures have as many digits as repeat on another machine.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

START, END = "<!-- quickstart", "<!-- quickstart end -->"


def figure(name: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    """Return the text of one of a model's figures in analysis.json."""
    return lambda model: f"{model['figures'][name]['value']:z.{digits}f}"  # z: no minus before 0.0


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "retrieval": figure("retrieval_top1", 1),
    "contrast": figure("contrast", 1),
    "cosine": figure("cosine", 1),
    "Align own": figure("align_px", 1),
    "Align other": figure("shuffled_align_px", 1),
    "H after": lambda model: f"{model['entropy_after']['entropy_nats']:.0f}",
    "name score": figure("name_bound", 1),
    "caption F1": lambda model: f"{model['names']['captions']['f1']['value']:.1f}",
}


def table_of(analysis: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table with a row for each model."""
    rows = [["projector", *COLUMNS], ["---", *["--:"] * len(COLUMNS)]]
    rows += [[name, *(text(model) for text in COLUMNS.values())] for name, model in analysis["models"].items()]
    return [f"| {' | '.join(row)} |" for row in rows]


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
    readme_path, analysis_path = map(Path, sys.argv[1:])
    analysis = json.loads(analysis_path.read_text(encoding="utf-8"))
    readme = readme_path.read_text(encoding="utf-8")
    readme_path.write_text(with_table(readme, table_of(analysis)), encoding="utf-8")
