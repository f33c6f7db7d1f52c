"""`benchmarks/run_all.py`: sides take turns, ratios are of the turns, and what cannot run says so."""

from __future__ import annotations

import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SERVED = """
import sys; sys.path.insert(0, {folder!r}); print("[an import's own line]")
from served_steps import Step, serve
held = []
def step():
    print("a library's own output")
    held.append(b"x" * 64_000_000)
    return Step(0.5, float(len(held)))
serve(step)
"""


@pytest.fixture(scope="module")
def run_all() -> Iterator[types.ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import run_all

        yield run_all


class Recorded:
    """A side that notes its turns in a list it shares, and takes as long as it is told."""

    def __init__(self, name: str, seconds: list[float], turns: list[str]):
        self.name, self.seconds, self.turns = name, iter(seconds), turns

    def step(self) -> tuple[float, float]:
        from served_steps import Step

        self.turns.append(self.name)
        return Step(next(self.seconds), 2.0 if self.name == "ours" else 2.0002)

    def end(self) -> None: ...


def test_sides_take_turns_and_the_first_turn_does_not_count(run_all: Any, tmp_path: Path) -> None:
    turns: list[str] = []
    row = run_all.Row("name", "what", "baseline", "detail")
    run = run_all.Run(tmp_path, repeats=3, is_tiny=True, upstream=None)
    run.take_turns(row, Recorded("ours", [9, 1, 2, 4], turns), Recorded("theirs", [9, 3, 4, 40], turns))
    assert turns == ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert row.ratios() == (3, 2, 10)  # of 3 / 1, 4 / 2 and 40 / 4
    assert "losses differ by 1e-04" in row.detail
    assert row.memory_ratios() is None


def test_a_served_side_answers_with_its_steps_and_its_memory(run_all: Any) -> None:
    side = run_all.ServedSide([sys.executable, "-c", SERVED.format(folder=str(ROOT / "benchmarks"))])
    assert [side.step() for _ in range(2)] == [(0.5, 1.0), (0.5, 2.0)]
    memory = side.end()
    assert 128 <= memory.above_loaded_mb < 140
    assert memory.above_loaded_mb < memory.whole_mb


def test_what_cannot_run_says_why_and_the_others_run(
    run_all: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(run_all, "MODELS", tmp_path)
    monkeypatch.setattr(run_all.Run, "weights", lambda *arguments: tmp_path)
    rows = "stage1_upstream,patch_loss,masks"
    assert run_all.main(["--tiny", "--repeats", "2", "--rows", rows, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    upstream, patch_loss, masks = report["rows"]
    assert upstream["status"] == "not run: no --upstream"
    assert patch_loss["status"].startswith("not run: no miniature")
    assert masks["status"] == "ok" and len(masks["seconds"]) == 2
    assert run_all.table_of(report) == (tmp_path / "table.md").read_text().strip()
    assert report["machine"]["commit"]


def test_unknown_rows_are_named(run_all: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run_all.main(["--rows", "masks,stage3"])
    assert "found stage3" in capsys.readouterr().err


@pytest.mark.slow
def test_every_row_runs_in_tiny_sizes(run_all: Any, tmp_path: Path) -> None:
    assert run_all.main(["--tiny", "--repeats", "2", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == list(run_all.ROWS)
    for row in report["rows"]:
        assert row["status"] == "ok" or row["status"].startswith("not run: "), row
    compared = [row for row in report["rows"] if "losses differ by" in row["detail"]]
    assert {"stage1_transformers", "stage1_plain"} <= {row["name"] for row in compared}
    for row in compared:
        gap = float(row["detail"].split("losses differ by ")[1].split()[0])
        assert gap < (1e-2 if "bf16" in row["name"] else 1e-5), row
    for points in report["growth"].values():
        assert all(math.isfinite(seconds) for _, seconds in points)
    assert (tmp_path / "growth.svg").exists()
