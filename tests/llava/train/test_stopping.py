"""A run that is told to stop saves, says where, and goes on from there as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.data.dataset import LazySupervisedDataset
from llava.train.checkpointing import missing_from_checkpoint
from llava.train.llava_trainer import LLaVATrainer
from llava.train.screen import STEP_LINE
from tests.llava.train.conftest import stage_1_flags
from tests.training import free_port, logged

LAUNCHING = Path(__file__).parents[3] / "scripts" / "launching.sh"
RUN = "--per_device_train_batch_size 1 --num_train_epochs 3 --save_strategy no --logging_steps 2"
# Sends SIGTERM to its process group in the forward pass of the fifth step, as from outside; twice, if told so.
SCRIPT = """
import os, signal, sys, time
from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import train
times = int(sys.argv.pop(1))
compute_loss = LLaVATrainer.compute_loss
def signalled(self, *args, **kwargs):
    if self.state.global_step == 4:
        for _ in range(times):
            os.kill(0, signal.SIGTERM)
            time.sleep(1.2 if times > 1 else 0)
    return compute_loss(self, *args, **kwargs)
LLaVATrainer.compute_loss = signalled
train()
"""


def run(times: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(times), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)


STATUSES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


def test_it_saves_and_goes_on(
    run_stage_1: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_stage_1("whole", RUN)
    compute_loss = LLaVATrainer.compute_loss
    for number, status in STATUSES.items():
        caplog.clear()

        def signalled(self: LLaVATrainer, *args: Any, number: int = number, **kwargs: Any) -> Any:
            if self.state.global_step == 4:
                signal.raise_signal(number)
            return compute_loss(self, *args, **kwargs)

        folder = number.name
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(LLaVATrainer, "compute_loss", signalled)
            run_stage_1(folder, RUN)
        assert stopped.value.code == status
        assert "step 5 of 12" in caplog.text and f"{folder}/checkpoint-5" in caplog.text
        assert not Path(folder, "mm_projector.bin").exists()
        assert logged(run_stage_1(folder, RUN)) == logged(whole)
        before, after = torch.load("whole/mm_projector.bin"), torch.load(f"{folder}/mm_projector.bin")
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_process_group_ends_without_traceback(golden_world: Path) -> None:
    stopped = run(1, stage_1_flags("run", f"{RUN} --dataloader_num_workers 1"))
    assert stopped.returncode == 143, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert missing_from_checkpoint(Path("run/checkpoint-5")) == []


def test_a_second_signal_ends_it_at_once(golden_world: Path) -> None:
    ended = run(2, stage_1_flags("run", RUN))
    assert ended.returncode == 143 and "Traceback" not in ended.stderr
    assert not list(Path("run").glob("checkpoint-*"))


def signal_script(launcher: str, is_ready: Callable[[str], object], number: int) -> tuple[int, str]:
    """Runs a launcher as scripts do, and signals the script once the log says so; returns exit code and log."""
    script = f"set -euo pipefail; source {LAUNCHING}; supervise {launcher}"
    log = Path("log")
    with log.open("w") as file:
        # Where the tests run in the background, SIGINT is ignored, which children inherit and bash cannot undo.
        process = subprocess.Popen(
            ["bash", "-c", script],
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not is_ready(log.read_text()) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        return process.wait(600), log.read_text()


# Stands for a launcher of two processes, which say what reaches them.
LAUNCHER = """
import os, signal, subprocess, sys
def receive(number, frame):
    os.write(1, f"rank {rank} received {number}\\n".encode())
    os._exit(1)
if rank := os.environ.get("LOCAL_RANK"):
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, receive)
    os.write(1, b"ready\\n")
    while True:
        signal.pause()
ranks = [subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": rank}) for rank in "01"]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.mark.parametrize(("number", "status"), STATUSES.items())
def test_scripts_pass_signals_on_to_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("launcher.py").write_text(LAUNCHER)
    ended, log = signal_script(f"{sys.executable} launcher.py", lambda log: log.count("ready") == 2, number)
    assert ended == status, log
    assert sorted(log.splitlines()[2:]) == [f"rank {rank} received {int(number)}" for rank in (0, 1)]


def test_ranks_that_a_script_signals_save_one_checkpoint(golden_world: Path) -> None:
    launcher = f"torchrun --nproc_per_node 2 --master_port {free_port()}"
    flags = stage_1_flags("run", "--per_device_train_batch_size 1 --num_train_epochs 5000")
    command = f"{launcher} -m llava.train.train {' '.join(flags)}"
    status, log = signal_script(command, STEP_LINE.search, signal.SIGINT)
    assert status == 130, log
    [saved] = Path("run").glob("checkpoint-*")
    assert missing_from_checkpoint(saved) == [] and (saved / "rng_state_1.pth").exists()
    assert str(saved) in log


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_worker_of_the_data_loader_is_named_with_its_file(
    run_stage_1: Any, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    def lose(self: LazySupervisedDataset, name: str, row: int) -> Any:
        os.kill(os.getpid(), sent)

    monkeypatch.setattr(LazySupervisedDataset, "_load_image", lose)
    with pytest.raises(ChildProcessError, match=r"worker 0: data_plain.json, record \d.*\.png"):
        run_stage_1("run", "--dataloader_num_workers 1 --dataloader_timeout 3")
    assert not multiprocessing.active_children()
