"""Runs commands that depend on each other, a few at a time, and skips what an earlier call has finished.

A step is done once its command has ended with status 0; a note says so, with a hash of the command and of the steps
before it. A step whose command has changed runs again, and so do those that need it. A step runs only for the sake of
steps that are not done: measures that were copied from another machine, with their notes, need no training here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patch_aligned.files import written_whole
from patch_aligned.web import render

LAST_LINES = 8


class StepError(RuntimeError):
    """A step has failed; the message holds the end of its log."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str  # unique, and the name of its log
    command: tuple[str, ...]  # program and arguments; `{state}` stands for the folder of the run
    needs: tuple[str, ...] = ()  # names of the steps before it
    kind: str = ""  # steps of a kind take about the same time
    minutes: float = 1.0  # how long one takes, until a step of its kind was timed here


def file_name(name: str) -> str:
    """A name without characters that paths should not have."""
    return re.sub(r"\W+", "_", name)


class Steps:
    """All steps of a run, in an order in which needs come first, and which are done.

    Logs, notes and the page go to `folder`; `jobs` commands run at a time.
    """

    def __init__(self, steps: Sequence[Step], folder: Path, title: str, jobs: int = 1):
        self.steps = {step.name: step for step in steps}
        self.folder, self.title, self.jobs = folder, title, jobs
        self.keys: dict[str, str] = {}
        for step in steps:
            before = [self.keys[need] for need in step.needs]
            described = json.dumps([step.command, before])
            self.keys[step.name] = hashlib.sha256(described.encode()).hexdigest()[:16]
        self.seconds = {name: found for name in self.steps if (found := self._seconds_of(name)) is not None}

    @property
    def pending(self) -> list[str]:
        """The steps that are to run: those that nothing needs, if they are not done, and what they need."""
        needed = {need for step in self.steps.values() for need in step.needs}
        pending: set[str] = set()
        stack = [name for name in self.steps if name not in needed]
        while stack:
            name = stack.pop()
            if name not in self.seconds and name not in pending:
                pending.add(name)
                stack.extend(self.steps[name].needs)
        return [name for name in self.steps if name in pending]

    def run(self) -> None:
        """Run what is not done. Steps beside one that fails are finished before the `StepError`."""
        waiting = self.pending
        running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        failed: str | None = None
        self.write_page(running)
        with _ended_together(running):
            while running or (waiting and failed is None):
                while failed is None and len(running) < self.jobs and (name := self._next(waiting)) is not None:
                    waiting.remove(name)
                    running[name] = self._start(self.steps[name]), time.monotonic()
                    self.write_page(running)
                time.sleep(0.2)
                for name, (process, began) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    if process.returncode == 0:
                        self._note(name, time.monotonic() - began)
                        print(f"{name}: {self.seconds[name]:.0f} s; {self.left(running)} left", flush=True)
                    else:
                        failed = name
                    self.write_page(running, failed)
        if failed is not None:
            log = self.log_of(failed)
            last = "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-LAST_LINES:])
            raise StepError(f"{failed}: the command has failed. The end of {log}:\n{last}")

    def left(self, running: dict[str, tuple[subprocess.Popen[bytes], float]]) -> str:
        """How long the steps that are not done take, `jobs` at a time, in words."""
        minutes = sum(self.minutes_of(self.steps[name]) for name in self.pending)
        minutes -= sum((time.monotonic() - began) / 60 for _, began in running.values())
        minutes = max(minutes, 0) / self.jobs
        return f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.0f} minutes"

    def minutes_of(self, step: Step) -> float:
        """The mean time of the steps of this kind that are done, else the first guess."""
        timed = [
            self.seconds[name] for name, other in self.steps.items() if other.kind == step.kind and name in self.seconds
        ]
        return sum(timed) / len(timed) / 60 if timed else step.minutes

    def write_page(self, running: dict[str, tuple[subprocess.Popen[bytes], float]], failed: str | None = None) -> None:
        """Write `progress.html`, which shows what is done and how long is left, and reloads itself."""

        def state(name: str) -> str:
            if name == failed:
                return "failed"
            return "running" if name in running else "waiting" if name in pending else "done"

        pending = self.pending
        rows = [
            {"name": name, "state": state(name), "seconds": self.seconds.get(name), "minutes": self.minutes_of(step)}
            for name, step in self.steps.items()
        ]
        page = render(
            __package__, "progress.html.j2", title=self.title, rows=rows, left=self.left(running), failed=failed
        )
        with written_whole(self.folder / "progress.html") as path:
            path.write_text(page, encoding="utf-8")

    def log_of(self, name: str) -> Path:
        """The file that takes what a step prints."""
        return self.folder / "logs" / f"{file_name(name)}.log"

    def _next(self, waiting: Sequence[str]) -> str | None:
        return next((name for name in waiting if all(need in self.seconds for need in self.steps[name].needs)), None)

    def _start(self, step: Step) -> subprocess.Popen[bytes]:
        log = self.log_of(step.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            return subprocess.Popen(
                [self._placed(word) for word in step.command],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _placed(self, text: str) -> str:
        return text.replace("{state}", str(self.folder))

    def _note_of(self, name: str) -> Path:
        return self.folder / "done" / f"{file_name(name)}.json"

    def _note(self, name: str, seconds: float) -> None:
        self.seconds[name] = seconds
        note = self._note_of(name)
        note.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(note) as path:
            path.write_text(json.dumps({"step": name, "key": self.keys[name], "seconds": round(seconds, 1)}) + "\n")

    def _seconds_of(self, name: str) -> float | None:
        with contextlib.suppress(FileNotFoundError):
            note: dict[str, Any] = json.loads(self._note_of(name).read_text(encoding="utf-8"))
            return note["seconds"] if note["key"] == self.keys[name] else None
        return None


@contextlib.contextmanager
def _ended_together(running: dict[str, tuple[subprocess.Popen[bytes], float]]) -> Iterator[None]:
    """Pass an interrupt on to the commands and wait for them, so that trainings save their state."""
    try:
        yield
    except BaseException:
        for process, _ in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process, _ in running.values():
            process.wait()
        raise
