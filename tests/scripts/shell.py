"""Runs scripts as a shell does. Under `DRY_RUN` they print what they would start, which is read back as words."""

from __future__ import annotations

import os
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import typer.main

from patch_aligned.cli import app

ROOT = Path(__file__).parents[2]


def run_script(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `scripts/SCRIPT` with nothing but `variables` in its environment, and `DRY_RUN` where that is not given."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **variables}
    command = ["bash", f"scripts/{script}", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def printed(script: str, *words: str, **variables: str) -> list[list[str]]:
    """The commands that a script would start, as words; the same call is run once."""
    return [shlex.split(line) for line in _printed(script, words, tuple(variables.items()))]


@cache
def _printed(script: str, words: tuple[str, ...], variables: tuple[tuple[str, str], ...]) -> list[str]:
    result = run_script(script, *words, **dict(variables))
    assert result.returncode == 0, result.stderr
    return result.stdout.replace("\\\n", " ").splitlines()


def options_of(words: list[str]) -> dict[str, Any]:
    """Options of a `patch-aligned` command, read by the real parser."""
    _, name, *arguments = words[words.index("patch-aligned") :]
    # The whole command line takes underscores for dashes; its subcommand, parsed alone, does not.
    arguments = [word.replace("_", "-") if word.startswith("--") else word for word in arguments]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return command.make_context(name, arguments).params
