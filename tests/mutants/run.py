"""Run each mutant's test on a copy of the tree that holds the mutant: the test has to fail.

    python tests/mutants/run.py [ID ...] [--jobs 2]
    python tests/mutants/run.py --relocate

The list is `mutants.yaml` beside this file, and README.md says what an entry is. The working tree is never changed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutants.yaml")
TIMEOUT_S = 600
# The profile fixes Hypothesis' examples and has no deadline, so that a slow machine kills no mutant.
PYTEST = (sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-profile=ci")
ALL_PASSED, TESTS_FAILED = 0, 1  # exit codes of pytest; others mean that no test was run


class Mutant(NamedTuple):
    """An entry of the list; `module` is where the behaviour was when the entry was written, `file` where it is now."""

    id: str
    module: str
    file: str
    old: str
    new: str
    breaks: str
    test: str


class Verdict(NamedTuple):
    """`killed`, `survived`, or why there is no verdict; and how long the test took."""

    text: str
    seconds: float


def read_list(path: Path = LIST) -> list[Mutant]:
    """The entries in order."""
    return [Mutant(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def write_list(mutants: Sequence[Mutant], path: Path = LIST) -> None:
    """Write the entries in the one format that this file has."""
    entries = [mutant._asdict() for mutant in mutants]
    path.write_text(yaml.safe_dump(entries, sort_keys=False, width=10**6, allow_unicode=True), encoding="utf-8")


def problems_of(mutant: Mutant, root: Path = ROOT) -> Iterator[str]:
    """Why an entry cannot be run, and what to change."""
    found = places(mutant.old, [root / mutant.file])
    if found != 1:
        yield (
            f"{mutant.id}: `old` is {found} times in {mutant.file}, expected once. Run with --relocate, which finds "
            "code that moved; if it was rewritten, let `file`, `old` and `new` say the same of the code as it is now"
        )
    elif message := syntax_error(mutant, root):
        yield f"{mutant.id}: {mutant.file} does not compile with `new` in place of `old`: {message}"
    path, _, name = mutant.test.partition("::")
    if places(f"def {function(name)}(", [root / path]) != 1:
        yield f"{mutant.id}: no test {mutant.test}. Run with --relocate, or name the test that guards this now"


def places(text: str, files: Sequence[Path]) -> int:
    """How often a text is in some files; one that is missing holds nothing."""
    return sum(file.read_text(encoding="utf-8").count(text) for file in files if file.is_file())


def function(name: str) -> str:
    """The function of a test's name, without class and parameters."""
    return name.split("[")[0].split("::")[-1]


def mutated(mutant: Mutant, root: Path) -> str:
    return (root / mutant.file).read_text(encoding="utf-8").replace(mutant.old, mutant.new)


def syntax_error(mutant: Mutant, root: Path) -> str:
    try:
        compile(mutated(mutant, root), mutant.file, "exec")
    except SyntaxError as error:
        return str(error)
    return ""


def relocated(mutant: Mutant, files: Sequence[str], root: Path = ROOT) -> Mutant:
    """The entry with the one file that holds its text now, and the one that holds its test."""
    path, _, name = mutant.test.partition("::")
    tests = [file for file in files if re.match(r"tests/(.*/)?test_[^/]*\.py$", file)]
    code = [file for file in files if file.endswith(".py") and not file.startswith("tests/")]
    if places(mutant.old, [root / mutant.file]) != 1:
        holding = [file for file in code if places(mutant.old, [root / file]) == 1]
        mutant = mutant._replace(file=holding[0] if len(holding) == 1 else mutant.file)
    if places(f"def {function(name)}(", [root / path]) != 1:
        holding = [file for file in tests if places(f"def {function(name)}(", [root / file]) == 1]
        mutant = mutant._replace(test=f"{holding[0] if len(holding) == 1 else path}::{name}")
    return mutant


def tracked_files(root: Path) -> list[str]:
    """Files that git knows or does not ignore, as they are in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in dict.fromkeys(listed) if name and (root / name).is_file()]


def copy_tree(root: Path, folder: Path) -> Path:
    """Copy the tracked files; returns the folder."""
    for name in tracked_files(root):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, folder / name)
    return folder


def pytest_in(folder: Path, arguments: Collection[str]) -> subprocess.CompletedProcess[str]:
    """Run pytest in a copy of the tree, with the modules of the copy."""
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",  # or a mutant of the same size and second would run as the code before it
    }
    command = [*PYTEST, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def tests_that_pass(folder: Path, tests: Collection[str]) -> set[str]:
    """Those of the tests that pass without a mutant; one with parameters passes where all that run do."""
    run = pytest_in(folder, ["-rpfE", *tests])
    if run.returncode not in (ALL_PASSED, TESTS_FAILED):
        raise RuntimeError(f"pytest does not run the tests without a mutant:\n{run.stdout}{run.stderr}")
    said = re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    passed = {test for test in tests for word, name in said if word == "PASSED" and is_of(name, test)}
    return passed - {test for test in tests for word, name in said if word != "PASSED" and is_of(name, test)}


def is_of(name: str, test: str) -> bool:
    return name == test or name.startswith(f"{test}[")


def verdict_on(mutant: Mutant, folder: Path) -> Verdict:
    """Run a mutant's test in a copy of the tree, which is as before afterwards."""
    file, started = folder / mutant.file, time.monotonic()
    before = file.read_bytes()
    try:
        file.write_text(mutated(mutant, folder), encoding="utf-8")
        code = pytest_in(folder, ["-x", mutant.test]).returncode
        other = f"no verdict: pytest ended with {code}, so that no test was run"
        text = {ALL_PASSED: "survived", TESTS_FAILED: "killed"}.get(code, other)
    except subprocess.TimeoutExpired:
        text = f"no verdict: the test did not end within {TIMEOUT_S} s"
    finally:
        file.write_bytes(before)
    return Verdict(text, time.monotonic() - started)


def verdicts(mutants: Sequence[Mutant], jobs: int, root: Path = ROOT) -> Iterator[tuple[Mutant, Verdict]]:
    """Each mutant with its verdict, in order."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folders: SimpleQueue[Path] = SimpleQueue()
        copies = [copy_tree(root, Path(name, str(number))) for number in range(jobs)]
        passing = tests_that_pass(copies[0], {mutant.test for mutant in mutants})
        for folder in copies:
            folders.put(folder)

        def judge(mutant: Mutant) -> Verdict:
            if mutant.test not in passing:
                return Verdict("no verdict: the test does not pass, or is skipped, without the mutant", 0.0)
            folder = folders.get()
            try:
                return verdict_on(mutant, folder)
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(jobs) as pool:
            yield from zip(mutants, pool.map(judge, mutants), strict=True)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help="mutants to run (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default: %(default)s)")
    parser.add_argument("--relocate", action="store_true", help="follow code and tests that moved to other files")
    arguments = parser.parse_args()

    mutants, files = read_list(), tracked_files(ROOT)
    if arguments.relocate:
        moved = [relocated(mutant, files) for mutant in mutants]
        write_list(moved)
        print(f"{sum(old != new for old, new in zip(mutants, moved, strict=True))} of {len(moved)} entries changed")
        mutants = moved
    if unknown := set(arguments.ids) - {mutant.id for mutant in mutants}:
        parser.error(f"no mutant {', '.join(sorted(unknown))} in {LIST}")
    chosen = [mutant for mutant in mutants if mutant.id in arguments.ids or not arguments.ids]
    if problems := [problem for mutant in chosen for problem in problems_of(mutant)]:
        print("\n".join(problems), file=sys.stderr)
        return 2
    if arguments.relocate:
        return 0

    started, killed = time.monotonic(), 0
    for mutant, verdict in verdicts(chosen, arguments.jobs):
        killed += verdict.text == "killed"
        print(f"{verdict.text:8} {verdict.seconds:5.1f} s  {mutant.id}  {mutant.module}  {mutant.test}", flush=True)
    print(f"{killed} of {len(chosen)} mutants killed in {time.monotonic() - started:.0f} s")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
