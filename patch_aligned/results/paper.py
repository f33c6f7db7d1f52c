"""Tables of the paper, read from paper.yaml, and which run or report fills which column beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Literal

import yaml
from pydantic import BeforeValidator, TypeAdapter

DASH = "–"

Shown = Literal["percent", "share", "sum"]
Gain = Literal["ratio of means", "mean of ratios"]
GAINS: tuple[Gain, ...] = ("ratio of means", "mean of ratios")


def relative_gain(before: Sequence[float], after: Sequence[float], how: Gain) -> float:
    """Gain over several columns: 0.16 is 16%. The paper's 16% and 4% are ratios of means, its 3% a mean of ratios."""
    if how == "ratio of means":
        return sum(after) / sum(before) - 1
    return sum(new / old - 1 for old, new in zip(before, after, strict=True)) / len(before)


@dataclass(frozen=True)
class Column:
    """A column and the score that fills it."""

    name: str  # its heading
    group: str = ""  # heading over several columns
    run_column: str = ""  # `column` of the runs that fill it; empty: any run of the table
    metric: str | None = None  # their score; None: their headline. For projectors: a path of keys in `analysis.json`
    shown: Shown = "percent"
    digits: int = 2  # after the decimal point

    @property
    def heading(self) -> str:
        """Both headings in one."""
        return f"{self.group} {self.name}".strip()


@dataclass(frozen=True)
class PaperRow:
    """A row as the paper prints it."""

    model: str
    cells: Annotated[tuple[str, ...], BeforeValidator(lambda text: text.replace("-", DASH).split())]
    facts: tuple[str, ...] = ()  # its columns that are no scores
    section: str = ""  # heading above it


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    columns: tuple[Column, ...]  # of scores
    rows: tuple[PaperRow, ...]
    conditions: str  # how these numbers were measured, as far as it is known
    gain: Gain | None = None  # how columns are averaged when a row is compared with its baseline
    fact_columns: tuple[str, ...] = ()  # headings of the rows' facts
    is_rec: bool = False  # referring expressions: protocols and frames differ, so runs are shown in separate blocks


_TEXT = resources.files(__package__).joinpath("paper.yaml").read_text(encoding="utf-8")
PAPER_TABLES = TypeAdapter(dict[int, PaperTable]).validate_python(yaml.safe_load(_TEXT), extra="forbid")
