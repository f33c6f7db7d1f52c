"""Runs a training that is killed as by `kill -9`; used by test_checkpoints.py.

usage: killed_run.py STEP FLAG... - dies while the checkpoint of STEP is being written; never, if STEP is 0.
"""

import os
import signal
import sys

from llava.train.llava_trainer import CheckpointingTrainer
from llava.train.train import train

STEP = int(sys.argv.pop(1))
save_optimizer = CheckpointingTrainer._save_optimizer_and_scheduler


def save_and_die(self: CheckpointingTrainer, output_dir: str) -> None:
    save_optimizer(self, output_dir)
    if self.state.global_step == STEP:
        os.kill(os.getpid(), signal.SIGKILL)


CheckpointingTrainer._save_optimizer_and_scheduler = save_and_die  # type: ignore[method-assign]
train()
