"""Every benchmark that says it belongs to a table of the paper finds its column there."""

from __future__ import annotations

import pytest

from eval.benchmarks import BENCHMARKS, Benchmark
from patch_aligned.results import paper as paper_tables

IN_TABLES = [benchmark for benchmark in BENCHMARKS.values() if benchmark.tables and benchmark.group != "mini"]


@pytest.mark.parametrize("benchmark", IN_TABLES, ids=lambda benchmark: benchmark.name)
def test_a_benchmark_finds_its_column(benchmark: Benchmark) -> None:
    for number in benchmark.tables:
        columns = [c for c in paper_tables.PAPER_TABLES[number].columns if c.run_column == benchmark.column]
        assert columns
        assert all((column.shown == "sum") == (benchmark.unit == "sum") for column in columns)


def test_every_column_but_those_of_analyses_and_captions_has_a_benchmark() -> None:
    for number, table in paper_tables.PAPER_TABLES.items():
        filled = {benchmark.column for benchmark in IN_TABLES if number in benchmark.tables}
        assert number in (1, 2, 3, 4) or {column.run_column for column in table.columns} == filled
