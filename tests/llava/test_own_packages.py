"""Another package under the name of one of ours is named before anything of it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(command: list[str], *folders: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with another `llava` and another `eval`."""
    for name in ("llava", "eval"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('it ran')")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ["llava/train/train_mem.py"],
        ["patch_aligned/train_mem.py"],
        ["-c", "import sys; sys.path.pop(0); import patch_aligned.cli"],  # as the command `patch-aligned` does
        ["llava/own_packages.py"],  # as launching scripts do
    ],
)
def test_another_llava_is_named_in_place_of_being_run(command: list[str], other: Path) -> None:
    found = run(command, other, ROOT)
    assert found.returncode == 1
    assert f"llava: {other / 'llava' / '__init__.py'} would be imported" in found.stderr
    assert "it ran" not in found.stderr


def test_another_eval_is_named_too(other: Path) -> None:
    (other / "llava" / "__init__.py").unlink()
    (other / "llava").rmdir()
    assert (
        f"eval: {other / 'eval' / '__init__.py'} would be imported"
        in run(["llava/own_packages.py"], other, ROOT).stderr
    )
    assert run(["llava/own_packages.py"], ROOT).returncode == 0
