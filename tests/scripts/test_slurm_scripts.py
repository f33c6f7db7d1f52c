"""The Slurm scripts, with stand-ins for `srun` and `scontrol`: what each machine runs, and when a job queues again."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.scripts.shell import ROOT, run_script

SLURM = ROOT / "scripts" / "slurm"
JOB = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_JOB_NUM_NODES": "2"}
JOB |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "SLURM_SUBMIT_DIR": str(ROOT)}
# One machine after the other; options come before the command.
SRUN = """while [[ $1 = --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@"; done"""
SCONTROL = """if [ "$1" = show ]; then printf 'gpu3\\ngpu4\\n'; else echo "$@" >"$CALLED"; fi"""


@pytest.fixture
def called(tmp_path: Path) -> Path:
    return tmp_path / "called"


def run(called: Path, *words: str, srun: str = SRUN, **variables: str) -> subprocess.CompletedProcess[str]:
    bin_folder = called.with_name("bin")
    bin_folder.mkdir(exist_ok=True)
    for name, body in {"srun": srun, "scontrol": SCONTROL}.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    path = f"{bin_folder}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SLURM / "train.sbatch"), *words], env={"PATH": path, "CALLED": str(called), **variables},
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip


def directives(name: str) -> dict[str, str]:
    text = (SLURM / name).read_text()
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_directives_of_job_scripts_come_before_the_first_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")]
    assert len(directives(path.name)) == sum(line.startswith("#SBATCH") for line in lines)
    assert "%" in directives(path.name)["output"]  # a log for each job


def test_the_directives_of_training_fit_the_command() -> None:
    found = directives("train.sbatch")
    assert found["ntasks-per-node"] == "1"  # torchrun makes a process a GPU
    assert found["gpus-per-node"] == "8"
    signal, seconds = re.fullmatch(r"B:(\w+)@(\d+)", found["signal"]).groups()  # type: ignore[union-attr]
    assert int(seconds) >= 300 and f"' {signal}\n" in (SLURM / "train.sbatch").read_text()
    assert found["requeue"] == "" and found["open-mode"] == "append"


@pytest.mark.parametrize("recipe", ["pretrain_patchaligned", "finetune"])
def test_each_machine_gets_the_recipe_with_its_rank_and_one_meeting_point(recipe: str, called: Path) -> None:
    result = run(called, recipe, "--seed", "4 3", DRY_RUN="1", **JOB)
    assert result.returncode == 0, result.stderr
    commands = [f"torchrun{rest}" for rest in result.stdout.split("torchrun")[1:]]
    of_a_machine = {"NNODES": "2", "MASTER_ADDR": "gpu3", "MASTER_PORT": "24567", "NUM_GPUS": "8"}
    scripts = [run_script(f"v1_5/{recipe}.sh", "--seed", "4 3", **of_a_machine, NODE_RANK=rank) for rank in "01"]
    expected = [script.stdout for script in scripts]
    assert commands == expected
    assert not called.exists()


def test_a_job_on_one_machine_needs_no_meeting_point(called: Path) -> None:
    result = run(called, "finetune", DRY_RUN="1", **JOB | {"SLURM_JOB_NUM_NODES": "1"})
    assert result.stdout.startswith("deepspeed --num_gpus 8 --master_port 24567 llava/train/train_mem.py")


# What Slurm does, and then the training.
SAVES = "trap 'kill $!; exit 143' USR1; sleep 60 >/dev/null 2>&1 & kill -s USR1 $PPID; wait"


@pytest.mark.parametrize(
    ("srun", "status", "requeued"),
    [
        (SAVES, 0, "requeue 1234567\n"),
        (SAVES.replace("exit 143", "exit 0"), 0, None),  # its last step was done
        (SAVES.replace("exit 143", "exit 1"), 1, None),  # it could not save
        ("exit 143", 143, None),  # stopped by hand
        ("exit 3", 3, None),
    ],
    ids=["saved", "finished", "failed to save", "stopped", "failed"],
)
def test_a_job_queues_again_where_it_was_told_to_stop_and_has_saved(
    srun: str, status: int, requeued: str | None, called: Path
) -> None:
    result = run(called, "finetune", srun=srun, **JOB)
    assert result.returncode == status, result.stderr
    assert (called.read_text() if called.exists() else None) == requeued


def test_an_unknown_stage_is_refused_before_anything_starts(called: Path) -> None:
    for words in ((), ("finetun",)):
        result = run(called, *words, **JOB)
        assert result.returncode == 2 and "expected a stage of scripts/v1_5" in result.stderr
