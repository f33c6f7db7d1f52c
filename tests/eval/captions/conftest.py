"""What the tests of captions share: a program that stands in for Java."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FAKE_JAVA = """#!{python}
import json, os, sys
if sys.argv[1:] == ["-version"]:
    print('openjdk version "{version}"', file=sys.stderr)
    sys.exit()
{body}
"""


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a program `java` in front of all others: it tells its version, and else does what it is given."""

    def make(body: str = "", version: str = "11.0.2") -> Path:
        program = tmp_path / "bin" / "java"
        program.parent.mkdir(exist_ok=True)
        program.write_text(FAKE_JAVA.format(python=sys.executable, version=version, body=body))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        return program

    return make
