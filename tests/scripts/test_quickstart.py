"""The quickstart runs its steps in order, trains both projectors alike, and skips what is done."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import show_in_readme
from tests.scripts.shell import ROOT, run_script

# Stands for python and patch-aligned: takes down its words, and leaves a projector where a training was to.
STUB = """#!{python}
import json, pathlib, sys
words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open({log!r}, "a") as log:
    log.write(json.dumps(words) + "\\n")
if words[1].endswith("train_mem.py"):
    folder = pathlib.Path(words[words.index("--output_dir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mm_projector.bin").touch()
"""


def run_quickstart(folder: Path) -> list[list[str]]:
    """Runs the script with everything heavy replaced; returns the commands that it gave, but for its checks."""
    bin_folder, log = folder / "bin", folder / "log.jsonl"
    bin_folder.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    for name in ("python", "patch-aligned"):
        stub = bin_folder / name
        stub.write_text(STUB.format(python=sys.executable, log=str(log)))
        stub.chmod(0o755)
    data = folder / "data" / "mini" / "train"
    data.mkdir(parents=True, exist_ok=True)
    for name in ("train.json", "pad.json"):
        (data / name).touch()
    places = {"VIRTUAL_ENV": str(folder), "RUN": str(folder / "run"), "DATA": str(folder / "data")}
    path = f"{bin_folder}:{os.environ['PATH']}"
    result = run_script("quickstart.sh", PATH=path, DRY_RUN="", STEPS="3", **places)
    assert result.returncode == 0, result.stderr
    words = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in words if "-I" not in line and line[1:] != ["-"]]


def trainings(calls: list[list[str]]) -> list[list[str]]:
    return [words for words in calls if words[1].endswith("train_mem.py")]


def analyses(calls: list[list[str]]) -> list[list[str]]:
    return [words for words in calls if words[:2] == ["patch-aligned", "analyze"]]


def test_both_projectors_are_trained_alike_and_analysed(tmp_path: Path) -> None:
    calls = run_quickstart(tmp_path)
    first, second = trainings(calls)
    assert (first[1], second[1]) == ("llava/train/train_mem.py", "patch_aligned/train_mem.py")
    for flag in ("--seed", "--max_steps", "--data_path", "--model_name_or_path", "--learning_rate"):
        assert first[first.index(flag) + 1] == second[second.index(flag) + 1]
    assert first[first.index("--max_steps") + 1] == "3"
    [analyze] = analyses(calls)
    projectors = [analyze[at + 1] for at, word in enumerate(analyze) if word == "--projector"]
    folders = [words[words.index("--output_dir") + 1] for words in (first, second)]
    assert projectors == ["random=random:0", f"captions={folders[0]}", f"patch_aligned={folders[1]}"]
    assert "heldout" in analyze[analyze.index("--data") + 1]


def test_a_second_call_trains_what_is_missing_alone(tmp_path: Path) -> None:
    run_quickstart(tmp_path)
    calls = run_quickstart(tmp_path)
    assert trainings(calls) == []
    assert len(analyses(calls)) == 1
    (tmp_path / "run" / "patch_aligned" / "mm_projector.bin").unlink()  # as after an interruption
    (only,) = trainings(run_quickstart(tmp_path))
    assert only[1] == "patch_aligned/train_mem.py"


def test_torch_without_cuda_is_installed_before_what_depends_on_it(tmp_path: Path) -> None:
    def installs(**variables: str) -> list[str]:
        lines = run_script("quickstart.sh", **variables).stdout.splitlines()
        return [line for line in lines if line.startswith("python -m pip install")]

    torch, project = installs(TORCH="cpu")
    assert torch.endswith("--no-deps --index-url https://download.pytorch.org/whl/cpu torch torchvision")
    assert "--constraint constraints.txt" in torch  # the tested version
    assert project.endswith("-e .[mini,analysis]")
    assert installs() == [project]
    [torch, _] = installs(TORCH="cpu", VIRTUAL_ENV=str(tmp_path))
    assert "constraints.txt" not in torch  # an environment of the user's keeps its versions


def test_the_room_that_packages_need_and_have_is_said(tmp_path: Path) -> None:
    command = ["bash", "-c", 'set -eu; source scripts/environment.sh; say_room "$1"', "bash", str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = re.fullmatch(rf"Packages take about 8 GB .*; {re.escape(str(tmp_path))} has (\d+) GB free\.\n", said)
    assert found is not None
    assert abs(int(found.group(1)) - shutil.disk_usage(tmp_path).free / 1e9) < 5


def test_the_table_takes_the_place_between_the_markers() -> None:
    names = ("retrieval_top1", "contrast", "cosine", "align_px", "shuffled_align_px", "name_bound")
    model = {
        "figures": {name: {"value": 0.26} for name in names},
        "entropy_after": {"entropy_nats": 1.6},
        "names": {"captions": {"f1": {"value": 0.44}}},
    }
    table = show_in_readme.table_of({"models": {"captions": model}})
    assert table[-1] == "| captions | 0.3 | 0.3 | 0.3 | 0.3 | 0.3 | 2 | 0.3 | 0.4 |"
    readme = "before\n<!-- quickstart: x -->\nold\n<!-- quickstart end -->\nafter\n"
    expected = "\n".join(["before", "<!-- quickstart: x -->", *table, "<!-- quickstart end -->", "after", ""])
    assert show_in_readme.with_table(readme, table) == expected
    with pytest.raises(ValueError, match="markers"):
        show_in_readme.with_table("no marker\n", table)


def test_the_readme_has_the_markers() -> None:
    assert "| x |" in show_in_readme.with_table((ROOT / "README.md").read_text(encoding="utf-8"), ["| x |"])
