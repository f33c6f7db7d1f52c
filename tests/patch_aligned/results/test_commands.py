from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from patch_aligned.cli import app

Make = Callable[..., Path]


@pytest.fixture
def two_models(make_run: Make, tmp_path: Path) -> list[str]:
    for model, hits in (("a", [1, 0]), ("b", [1, 1])):
        make_run(f"{model}/gqa", {"exact_match": hits}, tables=(6,), column="GQA", benchmark="gqa")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_table_is_printed_for_several_folders_after_one_option(two_models: list[str]) -> None:
    result = CliRunner().invoke(app, ["table", "6", "--runs", *two_models, "--names", "one, two"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "## Table 6: Visual question answering"
    assert [line.split("|")[1].strip() for line in lines if "±" in line and "|" in line] == ["one", "two"]
    assert "|" in lines[2]


@pytest.mark.parametrize(
    ("suffix", "start"), [(".md", "## Table 6"), (".tex", "% \\usepackage{booktabs}"), (".html", "<!doctype html>")]
)
def test_the_suffix_decides_the_format(two_models: list[str], tmp_path: Path, suffix: str, start: str) -> None:
    output = tmp_path / "new" / f"table{suffix}"
    result = CliRunner().invoke(app, ["table", "6", *two_models, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert output.read_text(encoding="utf-8").startswith(start)
    assert result.stdout == f"{output}: 1 table\n"


def test_two_models_are_compared(two_models: list[str]) -> None:
    result = CliRunner().invoke(app, ["compare", *two_models, "--names", "A,B", "--resamples", "200"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("## B against A\n")
    assert "| gqa " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["3"], "Table 3 measures projectors, not answers"),
        (["9", "RUNS"], "found '9', expected 4, 5, 6, 7, 8 or runs"),
        (["6"], "--runs: found no folder, expected at least one"),
        (["6", "nowhere"], "nowhere: found no result.json"),
        (["7", "RUNS"], "no run belongs to Table 7; found runs of gqa"),
        (["6", "RUNS", "--output", "table.pdf"], "found suffix '.pdf', expected .md, .tex or .html"),
        (["6", "RUNS", "--names", "a,b"], "--names: found 2, expected 1"),
    ],
)
def test_wrong_input_ends_with_one_sentence(two_models: list[str], arguments: list[str], message: str) -> None:
    words = [two_models[0] if word == "RUNS" else word for word in arguments]
    result = CliRunner().invoke(app, ["table", *words])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
