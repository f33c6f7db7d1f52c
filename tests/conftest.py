"""Fixtures that many tests share."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL
import pytest
from hypothesis import settings
from PIL import ImageFile

# Set before huggingface_hub is imported: a name that is no folder fails at once, instead of after minutes of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# On CPUs with AMX, torch's attention in bfloat16 fails where this caps its own kernels and not oneDNN's.
if os.environ.get("ATEN_CPU_CAPABILITY") in ("default", "avx2"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# A slow or busy machine is no failure.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")

GOLDENS = Path(__file__).parent / "goldens" / "llava"


def pytest_collection_finish() -> None:
    """Exempts what was imported from garbage collection: every training ends with one, which would take a second."""
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Says in the last line which extras were missing and how to install them. Tests name theirs when they skip."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    extras = {extra for report in skipped for extra in re.findall(r"extra `(\w+)`", str(report.longrepr))}
    if extras:
        names = ",".join(sorted(extras))
        print(f"Skipped what needs the extras {names}; to run it too: python -m pip install -e '.[{names}]'")


@pytest.fixture(autouse=True)
def truncated_images_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Pillow has it, whatever was imported before: lmms-eval lets a whole process fill cut images with grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of outputs recorded from the original LLaVA, with the tiny checkpoints they were recorded on."""
    return GOLDENS


@pytest.fixture(scope="session")
def pillow_of_the_recordings() -> None:
    """Skips where Pillow is older than the one that pixels were recorded with."""
    if int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("pixels were recorded with Pillow 13, which resizes some tall pictures otherwise than those before")


@pytest.fixture
def golden_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A writable copy of the tiny checkpoints, images and data, made the working directory.

    The recorded configs name the tower by a relative path (`tiny-clip`), as the recording scripts ran in that folder.
    """
    for name in ("tiny-clip", "tiny-llava", "tiny-vicuna", "tiny-tok-legacy", "tiny-tok-mpt", "train_init", "images"):
        shutil.copytree(GOLDENS / name, tmp_path / name)
    for name in ("data_conv.json", "data_mix.json", "data_plain.json"):
        shutil.copy(GOLDENS / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_python(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Does what `python ARGUMENTS` does, with a file or `-m` and a module, in this process, which has torch loaded."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        is_module = arguments[0] == "-m"
        name = arguments[is_module]
        monkeypatch.setattr(sys, "argv", [name, *arguments[is_module + 1 :]])
        run_as_main = runpy.run_module if is_module else runpy.run_path
        status: Any = None
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                run_as_main(name, run_name="__main__")
            except SystemExit as end:
                status = end.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
        status = 1 if isinstance(status, str) else status or 0
        return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())

    return run
