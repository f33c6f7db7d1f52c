"""Runs a training that is killed as by `kill -9`; used by test_checkpoints.py.

usage: killed_run.py FLAG... - dies while the checkpoint of step 6 is being written.
"""

import os
import signal

from llava.train.checkpointing import CheckpointingTrainer
from llava.train.train import train

save_optimizer = CheckpointingTrainer._save_optimizer_and_scheduler


def save_and_die(self: CheckpointingTrainer, output_dir: str) -> None:
    save_optimizer(self, output_dir)
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)


CheckpointingTrainer._save_optimizer_and_scheduler = save_and_die  # type: ignore[method-assign]
train()
