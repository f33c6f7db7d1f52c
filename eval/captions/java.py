"""The Java that the caption metrics run in."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess

_VERSION = re.compile(r'version "(?:1\.)?(\d+)')  # 1.8.0_392 is Java 8


class JavaError(OSError):
    """Java, or a metric that runs in it, is missing or failed; the message says what to do next."""


def java_version(program: str = "java") -> int:
    """Major version of a Java.

    Raises:
        JavaError: it is not there, or does not start.
    """
    advice = "next: apt-get install default-jre-headless, or conda install openjdk"
    if shutil.which(program) is None:
        raise JavaError(f"{program}: found no such program, and caption metrics run in Java; {advice}")
    # On a Mac without Java a program of that name does nothing but fail.
    told = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    version = _VERSION.search(told.stderr + told.stdout)
    if told.returncode != 0 or version is None:
        said = (told.stderr or told.stdout).strip().splitlines() or ["nothing"]
        raise JavaError(f"{program} -version: found {said[0]!r}, expected a version; {advice}")
    return int(version.group(1))


def require_metrics() -> None:
    """Checks that captions can be scored on this machine.

    Raises:
        ImportError: pycocoevalcap is not installed.
        JavaError: Java is missing.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ImportError("pycocoevalcap is not installed; next: pip install -e '.[eval]'")
    java_version()
