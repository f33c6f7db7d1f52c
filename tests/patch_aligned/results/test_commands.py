from __future__ import annotations

import json
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


def test_two_models_are_compared_and_seeds_of_one_are_joined_by_commas(two_models: list[str]) -> None:
    a, b = two_models
    for first, second, row in ((a, b, "| gqa "), (f"{a},{b}", f"{b},{b}", "| gqa, seed 2 ")):
        result = CliRunner().invoke(app, ["compare", first, second, "--names", "A,B", "--resamples", "200"])
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("## B against A\n")
        assert row in result.stdout
    assert CliRunner().invoke(app, ["compare", a, b, "--names", "A"]).exit_code == 2


@pytest.mark.parametrize("number", ["1", "2", "3"])
def test_tables_of_projectors_take_reports_and_name_the_command(tmp_path: Path, number: str) -> None:
    names = ("align_px", "align_px_per_image", "shuffled_align_px", "cosine", "best_word_cosine", "contrast")
    figures: dict[str, object] = {name: {"value": 0.25 + 0.1 * place} for place, name in enumerate(names)}
    figures["retrieval_top1"] = {"value": None}
    entropies = {f"entropy_{side}": {"entropy_nats": nats} for side, nats in (("before", 2.25), ("after", 1.5))}
    model = {"figures": figures, **entropies, "entropy_drop_nats": 0.75, "cosine_floor": 0.5}
    (tmp_path / "analysis.json").write_text(json.dumps({"models": {"ours": model}}))
    result = CliRunner().invoke(app, ["table", number, str(tmp_path)])
    assert result.exit_code == 0, result.output
    [row] = [line for line in result.stdout.splitlines() if line.startswith("| ours")]
    expected = {
        "1": ["2.2500", "1.5000"],
        "2": ["0.250", "0.350", "0.450"],
        "3": ["0.7500", "0.250", "0.350", "0.450", "0.55", "0.65", "0.50", "0.75", "–"],
    }
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == expected[number]
    alone = CliRunner().invoke(app, ["table", number])
    assert alone.exit_code == 0
    assert "bash scripts/v1_5/analyze.sh" in alone.stdout
    (tmp_path / "analysis.json").write_text(json.dumps({"models": {"old": {"figures": {}}}}))
    assert CliRunner().invoke(app, ["table", number, str(tmp_path)]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["3", "RUNS"], "there is no such file; expected the --output of patch-aligned analyze"),
        (["9", "RUNS"], "found '9', expected a number from 1 to 8, or runs"),
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
