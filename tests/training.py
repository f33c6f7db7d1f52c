"""What tests of whole trainings share: what a trainer logged, and runs in several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def logged(trainer: Any, name: str = "loss") -> list[float]:
    """All values that a trainer logged under one name."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def run_in_two_processes(*words: str) -> None:
    """Runs a script, or `-m` and a module, by torchrun, a thread a process; it has to end well."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    finished = subprocess.run(
        [sys.executable, *launcher, *words], env=environment, capture_output=True, text=True, check=False, timeout=1200
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
