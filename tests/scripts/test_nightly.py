"""`scripts/nightly.sh` on a Python that only notes what it is asked, and the last line of a test run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts.shell import ROOT, run_script

# Makes an "environment" of itself, prints its arguments, and fails where they contain $FAILING.
PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "export VIRTUAL_ENV=$3 PATH=$3/bin:\\$PATH" > "$3/bin/activate"
else
    echo "python $*"
    [[ "$*" != *"$FAILING"* ]]
fi
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(PYTHON)
    path.chmod(0o755)
    return path


def nightly(python: Path, *steps: str, failing: str = "nothing") -> subprocess.CompletedProcess[str]:
    places = {"PYTHON": str(python), "WORK": str(python.parent / "work")}
    return run_script("nightly.sh", *steps, **os.environ | places | {"FAILING": failing, "DRY_RUN": ""})


def test_steps_run_in_fresh_environments_and_end_in_a_table(python: Path) -> None:
    result = nightly(python, "floors", "newest")
    assert result.returncode == 0, result.stderr
    assert [row.split()[:2] for row in result.stdout.splitlines()[-2:]] == [["floors", "passed"], ["newest", "passed"]]
    work = python.parent / "work"
    assert sorted(path.name for path in work.iterdir()) == ["floors.log", "newest.log"]  # and no environment
    floors, newest = ((work / f"{step}.log").read_text() for step in ("floors", "newest"))
    assert "--resolution lowest-direct" in floors
    assert "lowest" not in newest
    for log in (floors, newest):
        assert re.fullmatch("python -m pytest .*-m not gpu and not net", log.splitlines()[-1])


@pytest.mark.parametrize("failing", ["lowest-direct", "pytest"])
def test_a_step_that_fails_stops_there_and_the_next_one_runs(python: Path, failing: str) -> None:
    result = nightly(python, "floors", "newest", failing=failing)
    assert result.returncode == 1
    floors, newest = result.stdout.splitlines()[-2:]
    assert floors.split()[:2] == ["floors", "FAILED"]
    assert failing in floors.split("min")[1]  # the command that failed is the last that was run
    assert newest.split()[1] == ("passed" if failing == "lowest-direct" else "FAILED")


def test_steps_are_chosen_by_name(python: Path) -> None:
    assert nightly(python, "newest").returncode == 0
    assert not (python.parent / "work" / "floors.log").exists()
    result = nightly(python, "oldest")
    assert result.returncode == 2
    assert "found step 'oldest', expected one of: floors newest readme" in result.stderr


@pytest.mark.parametrize("extra", ["eval", None])
def test_the_last_line_of_a_test_run_in_several_processes_names_missing_extras(
    tmp_path: Path, extra: str | None
) -> None:
    reason = "Java is not installed" if extra is None else f"no_such_package is part of the extra `{extra}`"
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    test = f"def test_it():\n    pytest.importorskip('no_such_package', reason='{reason}')\n"
    (tmp_path / "test_it.py").write_text(f"import pytest\n\n\n{test}")
    command = [sys.executable, "-m", "pytest", "-n", "1", "--rootdir", str(tmp_path), str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if extra is None:
        assert "1 skipped" in lines[-1]
    else:
        assert "".join(lines).count("python -m pip install -e '.[eval]'") == 1
        assert lines[-1].endswith("python -m pip install -e '.[eval]'")
