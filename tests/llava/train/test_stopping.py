"""A run that is told to stop saves, says where, and goes on from there as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.data.dataset import LazySupervisedDataset
from llava.train.checkpointing import missing_from_checkpoint

LAUNCHING = Path(__file__).parents[3] / "scripts" / "launching.sh"
RUN = "--per_device_train_batch_size 1 --num_train_epochs 3 --save_strategy no --logging_steps 2"
# Sends itself a signal in the forward pass of a step, as from outside; twice, if told so.
SCRIPT = """
import os, signal, sys, time
from llava.train.llava_trainer import LLaVATrainer
from llava.train.train import train
step, *numbers = map(int, sys.argv.pop(1).split(","))
compute_loss = LLaVATrainer.compute_loss
def signalled(self, *args, **kwargs):
    if self.state.global_step == step:
        for number in numbers:
            os.kill(0 if GROUP else os.getpid(), number)
            time.sleep(1.2 if len(numbers) > 1 else 0)
    return compute_loss(self, *args, **kwargs)
LLaVATrainer.compute_loss = signalled
train()
"""


def run(signals: str, arguments: list[str], group: bool = False) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.replace("GROUP", str(group))
    command = [sys.executable, "-c", script, signals, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)


@pytest.mark.parametrize(
    ("number", "status", "flags"),
    [
        (signal.SIGTERM, 143, ""),
        (signal.SIGTERM, 143, "--dataloader_num_workers 1"),
        (signal.SIGUSR1, 143, ""),
        (signal.SIGINT, 130, ""),
    ],
)
def test_it_saves_and_goes_on(
    run_stage_1: Any, stage_1_flags: Any, logged: Any, number: int, status: int, flags: str
) -> None:
    whole = run_stage_1("whole", RUN)
    stopped = run(f"4,{int(number)}", stage_1_flags("run", f"{RUN} {flags}"), group=bool(flags))
    assert stopped.returncode == status, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "step 5 of 12" in stopped.stderr and "run/checkpoint-5" in stopped.stderr
    assert not Path("run/mm_projector.bin").exists()
    resumed = run_stage_1("run", RUN)
    assert logged(resumed) == logged(whole)
    before, after = torch.load("whole/mm_projector.bin"), torch.load("run/mm_projector.bin")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_second_signal_ends_it_at_once(golden_world: Path, stage_1_flags: Any) -> None:
    ended = run(f"4,{int(signal.SIGTERM)},{int(signal.SIGTERM)}", stage_1_flags("run", RUN))
    assert ended.returncode == 143 and "Traceback" not in ended.stderr
    assert not list(Path("run").glob("checkpoint-*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_scripts_pass_signals_on_to_all_ranks(golden_world: Path, stage_1_flags: Any, number: int, status: int) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        launcher = f"torchrun --nproc_per_node 2 --master_port {probe.getsockname()[1]}"
    flags = stage_1_flags("run", "--per_device_train_batch_size 1 --num_train_epochs 5000")
    script = f"set -euo pipefail; source {LAUNCHING}; supervise {launcher} -m llava.train.train {' '.join(flags)}"
    with Path("log").open("w") as log:
        process = subprocess.Popen(["bash", "-c", script], stdout=log, stderr=subprocess.STDOUT)
        while "'loss'" not in Path("log").read_text() and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(120) == status, Path("log").read_text()
    [saved] = Path("run").glob("checkpoint-*")
    assert missing_from_checkpoint(saved) == [] and (saved / "rng_state_1.pth").exists()
    assert str(saved) in Path("log").read_text()


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_worker_of_the_data_loader_is_named_with_its_file(
    run_stage_1: Any, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    def lose(self: LazySupervisedDataset, name: str, row: int) -> Any:
        os.kill(os.getpid(), sent)

    monkeypatch.setattr(LazySupervisedDataset, "_load_image", lose)
    with pytest.raises(RuntimeError, match=r"worker 0: data_plain.json, record \d.*\.png"):
        run_stage_1("run", "--dataloader_num_workers 1 --dataloader_timeout 3")
    assert not multiprocessing.active_children()
