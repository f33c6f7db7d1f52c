"""How benchmarks measure: times of actions, their command lines, and the machine. Needs the standard library alone."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's own first lines."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def require_miniature(*paths: Path) -> None:
    """End the program where a part of the miniature is missing."""
    for path in paths:
        if not path.exists():
            raise SystemExit(f"No {path}; next: bash scripts/prepare_mini.sh")


def times_of(
    action: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter, device: str = "cpu"
) -> list[float]:
    """Seconds of each run of an action."""
    seconds = []
    for _ in range(repeats):
        wait_for(device)
        start = clock()
        action()
        wait_for(device)
        seconds.append(clock() - start)
    return seconds


def median_seconds(action: Callable[[], object], repeats: int, device: str) -> float:
    """Median time of an action, after one run to warm up."""
    return statistics.median(times_of(action, repeats + 1, device=device)[1:])


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was asked."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def fastest(action: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Least time of several runs, by the clock and by the processor, of which others count in the clock alone."""
    runs = []
    for _ in range(repeats):
        clock, processor = time.perf_counter(), time.process_time()
        action()
        runs.append((time.perf_counter() - clock, time.process_time() - processor))
    clocks, processors = zip(*runs, strict=True)
    return min(clocks), min(processors)


def describe_machine(*packages: str) -> dict[str, Any]:
    """What numbers are measured on; a package that is not installed has no version."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return {
        "python": platform.python_version(),
        "versions": {package: _version_of(package) for package in packages},
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None,
        "date": date.today().isoformat(),
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
