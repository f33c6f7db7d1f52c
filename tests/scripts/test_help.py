"""`--help` of the scripts: the comment at their top, and that of the file with their variables."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCED = ("common.sh", "environment.sh", "help.sh", "launching.sh")
NAMES = [path for path in sorted(ROOT.glob("scripts/**/*.sh")) if path.name not in SOURCED]


@pytest.mark.parametrize("path", NAMES, ids=lambda path: path.name)
def test_help_prints_the_header_and_runs_nothing(path: Path, tmp_path: Path) -> None:
    result = subprocess.run(["bash", str(path), "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    comment = path.read_text().splitlines()[1].removeprefix("# ")
    assert result.stdout.startswith(comment)
    assert ("NUM_GPUS=N" in result.stdout) == ("common.sh\n" in path.read_text() or "NUM_GPUS=N" in path.read_text())


def test_help_finds_the_script_by_a_relative_path() -> None:
    command = ["bash", "../scripts/v1_5/pretrain.sh", "-h"]
    result = subprocess.run(command, cwd=ROOT / "docs", capture_output=True, text=True, check=True)
    assert result.stdout.startswith("Stage 1 of LLaVA-1.5") and "PRESET=mini" in result.stdout
