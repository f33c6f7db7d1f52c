"""`benchmarks/gpu.sh --tiny`: all of what a GPU is to measure, in tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PARTS = {
    "tests", "stage_1", "stage_2", "vlm_step", "patch_loss", "pursuit", "masks", "answering", "annotation",
    "segmenters", "attention",
}  # fmt: skip
TYPES = {
    "part": str, "name": str, "status": str, "seconds": float, "rate": float, "unit": str, "baseline": str,
    "speedup": float, "peak_gib": float, "peak_share": float, "detail": str,
}  # fmt: skip
NEVER_NONE = {"part", "name", "status", "detail"}


def run(out: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--tiny", *flags], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OUT": str(out), **variables},
    )  # fmt: skip


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a run of all parts wrote."""
    folder = tmp_path_factory.mktemp("gpu")
    result = run(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_every_part_has_rows_and_none_failed(out: Path) -> None:
    rows = rows_of(out)
    assert {row["part"] for row in rows} == PARTS
    for row in rows:
        # Tests of a GPU are skipped where there is none, and flash-attn is not everywhere.
        allowed = {"tests": ("ok", "skipped"), "attention": ("ok", "missing")}.get(row["part"], ("ok",))
        assert row["status"] in allowed, row
        assert row["status"] != "missing" or row["name"] == "flash_attn"


@pytest.mark.slow
def test_rows_have_the_types_that_are_documented(out: Path) -> None:
    for row in rows_of(out):
        assert row.keys() == TYPES.keys()
        for key, value in row.items():
            assert isinstance(value, TYPES[key]) or (value is None and key not in NEVER_NONE), (key, row)


@pytest.mark.slow
def test_a_speedup_is_the_rate_over_that_of_its_baseline(out: Path) -> None:
    rows = rows_of(out)
    rates = {(row["part"], row["name"]): row["rate"] for row in rows}
    compared = [row for row in rows if row["speedup"] is not None]
    for row in compared:
        assert row["speedup"] == pytest.approx(row["rate"] / rates[row["part"], row["baseline"]])
    assert {row["part"] for row in compared} == PARTS - {"tests"}


@pytest.mark.slow
def test_report_and_table_hold_the_same_rows(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    assert report["rows"] == rows_of(out)
    assert report["machine"]["tiny"] is True
    assert report["machine"]["card"] is None
    lines = (out / "table.md").read_text().splitlines()
    cells = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines if line.startswith("| ")]
    assert cells == [("part", "what"), *((row["part"], row["name"]) for row in report["rows"])]


@pytest.mark.slow
def test_a_part_that_is_cut_off_is_a_row_and_rows_of_other_parts_stay(out: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(out, tmp_path / "again"))
    result = run(again, "--seconds", "0", PARTS="masks")
    assert result.returncode == 1, result.stderr
    *others, last = rows_of(again)
    assert others == [row for row in rows_of(out) if row["part"] != "masks"]
    assert (last["part"], last["status"]) == ("masks", "cut off")


def test_parts_that_are_not_there_are_named(tmp_path: Path) -> None:
    result = run(tmp_path, PARTS="masks,stage3")
    assert result.returncode == 2
    assert "found stage3, expected some of tests, stage_1" in result.stderr
