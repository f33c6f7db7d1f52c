"""The list of mutants fits the code, and its runner calls only a failed test a kill."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import run

ROOT = Path(__file__).parents[2]
CODE = "def is_adult(age):\n    return age >= 18\n"
TESTS = """
import pytest
from people import is_adult

def test_at_the_bound():
    assert is_adult(18)

def test_above():
    assert is_adult(19)

@pytest.mark.skip
def test_skipped():
    assert is_adult(18)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of one function and its tests."""
    root = tmp_path / "tree"
    (root / "tests").mkdir(parents=True)
    (root / "people.py").write_text(CODE)
    (root / "tests" / "test_people.py").write_text(TESTS)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    return root


def test_each_entry_fits_the_code_and_names_a_test() -> None:
    assert [problem for mutant in run.read_list() for problem in run.problems_of(mutant)] == []


def test_there_are_sixty_entries_and_at_most_two_a_module() -> None:
    mutants = run.read_list()
    assert len({mutant.id for mutant in mutants}) == len(mutants) >= 60
    assert max(Counter(mutant.module for mutant in mutants).values()) <= 2
    assert {mutant.module.split("/")[0] for mutant in mutants} == {"llava", "patch_aligned", "eval"}


def test_the_list_is_written_as_it_was_read(tmp_path: Path) -> None:
    run.write_list(run.read_list(), tmp_path / "list.yaml")
    assert (tmp_path / "list.yaml").read_bytes() == run.LIST.read_bytes()


def mutant(test: str, **changes: str) -> object:
    entry = {"id": test, "module": "people.py", "file": "people.py", "old": "age >= 18", "new": "age > 18"}
    return run.Mutant(**{**entry, "breaks": "", "test": f"tests/test_people.py::{test}", **changes})


def test_only_a_failed_test_is_a_kill(tree: Path) -> None:
    mutants = [
        mutant("test_at_the_bound"),
        mutant("test_above"),
        mutant("test_skipped"),
        mutant("test_above", old="def is_adult", new="def is_grown"),
    ]
    texts = [verdict.text for _, verdict in run.verdicts(mutants, 1, tree)]
    assert texts[:2] == ["killed", "survived"]
    assert "without the mutant" in texts[2]
    assert "no test was run" in texts[3]
    assert (tree / "people.py").read_text() == CODE


def test_an_entry_that_does_not_fit_says_what_to_change(tree: Path) -> None:
    assert list(run.problems_of(mutant("test_above"), tree)) == []
    for changes, message in (
        ({"old": "age"}, "`old` is 2 times in people.py, expected once. Run with --relocate"),
        ({"new": "age >"}, "people.py does not compile"),
        ({"file": "gone.py"}, "`old` is 0 times in gone.py"),
    ):
        (problem,) = run.problems_of(mutant("test_above", **changes), tree)
        assert message in problem
    assert "no test tests/test_people.py::test_gone" in next(run.problems_of(mutant("test_gone"), tree))


def test_entries_follow_code_and_tests_that_move(tree: Path) -> None:
    (tree / "people.py").rename(tree / "ages.py")
    (tree / "tests" / "test_people.py").rename(tree / "tests" / "test_ages.py")
    found = run.relocated(mutant("test_above[19]"), run.tracked_files(tree), tree)
    assert (found.module, found.file, found.test) == ("people.py", "ages.py", "tests/test_ages.py::test_above[19]")
