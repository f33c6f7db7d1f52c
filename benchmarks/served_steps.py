"""Steps that another process asks for, one at a time: so both sides of a ratio take turns, each with its own memory.

The standard library alone, as it also runs in upstream's environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Step(NamedTuple):
    """What a step took, and its loss."""

    seconds: float
    loss: float


class Memory(NamedTuple):
    """Most memory of a process, and most of its steps above what it held after loading, in MB."""

    whole_mb: float
    above_loaded_mb: float


def status_mb(field: str) -> float:
    """A field of this process's memory, as Linux has it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


def serve(step: Callable[[], Step]) -> None:
    """Do a step for each line of the standard input that says `step`; then report the memory."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    before, loaded = status_mb("VmHWM"), status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    answers.write("ready\n")
    for line in sys.stdin:
        if line.strip() != "step":
            break
        answers.write(json.dumps(step()) + "\n")
    peak = status_mb("VmHWM")
    answers.write(json.dumps([max(before, peak), peak - loaded]) + "\n")


class ServedSide:
    """A side in a process of its own."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        )
        while self.answer() != "ready\n":  # imports may print
            pass

    def answer(self) -> str:
        """The next line of the process."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return line
        raise ChildProcessError(f"{self.process.args!r}: ended with status {self.process.wait()}")

    def ask(self, word: str) -> Any:
        """Send a word; return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return json.loads(self.answer())

    def step(self) -> Step:
        """One step."""
        return Step(*self.ask("step"))

    def end(self) -> Memory:
        """End the process; what it used."""
        memory = Memory(*self.ask("end"))
        self.process.wait()
        return memory
